"""Run a decoder step by step: prompt, chunks, single tokens, padded batches; with or without a KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.runtime.cache_buffers import CacheBuffers
from onnxslim_llm.runtime.session import Array, Session
from onnxslim_llm.runtime.signature import DecoderSignature, Extra

__all__ = ["DecoderRunner", "DecoderState"]

# float32 rounding between runs of different length; a non-causal model differs by the size of its logits.
_CAUSAL_TOLERANCE = 1e-2
_PROBE_TOKENS = 6


@dataclass(frozen=True)
class DecoderState:
    """What a decoder has seen so far.

    Attributes:
        mask: [B, T] int64, 1 for real tokens and 0 for padding.
        caches: OrtValues by the name of the past input.
        buffers: instead of `caches`, for a decoder that extends them in place.
        ids: [B, T] token ids, kept only for a model without a cache.
    """

    mask: Array
    caches: dict[str, Any] = field(default_factory=dict)
    ids: Array | None = None
    buffers: CacheBuffers | None = None

    @property
    def length(self) -> int:
        """Number of tokens seen, padding included."""
        return int(self.mask.shape[1])


class DecoderRunner:
    """Feeds a decoder of any signature and carries its cache as OrtValues, without copies.

    Args:
        session: the open model.
        signature: its signature; recognised if not given.

    Raises:
        ModelError: the model is no decoder that can be run.
    """

    def __init__(self, session: Session, signature: DecoderSignature | None = None) -> None:
        self.session = session
        self.signature = signature or DecoderSignature.of(session)
        self._vocab = self.signature.vocab

    @property
    def where(self) -> str:
        """File or label of the model, for messages."""
        return self.session.where

    @property
    def vocab(self) -> int:
        """Vocabulary size; asked from the model by running one token if the graph does not say it."""
        if self._vocab is None:
            length, batch = self.signature.length or 1, self.signature.batch or 1
            logits, _ = self.extend(np.zeros((batch, length), np.int64))
            self._vocab = int(logits.shape[-1])
        return self._vocab

    def prefill(
        self, ids: Array, state: DecoderState | None = None, mask: Array | None = None, *, chunk: int | None = None
    ) -> tuple[Array, DecoderState]:
        """Run `ids` [B, S] after `state`, in pieces of `chunk` tokens; logits as `extend`, joined along S."""
        if self.signature.caches and self.signature.length:
            chunk = self.signature.length
        if chunk is None or chunk >= ids.shape[1]:
            return self.extend(ids, state, mask)
        parts: list[Array] = []
        for start in range(0, ids.shape[1], chunk):
            piece = slice(start, start + chunk)
            logits, state = self.extend(ids[:, piece], state, None if mask is None else mask[:, piece])
            parts.append(logits)
        if state is None:
            raise UsageError("there are no tokens to run")
        return (parts[-1] if self.signature.last_token_only else np.concatenate(parts, axis=1)), state

    def extend(
        self, ids: Array, state: DecoderState | None = None, mask: Array | None = None
    ) -> tuple[Array, DecoderState]:
        """Run `ids` [B, S] once after what `state` has seen.

        Args:
            ids: token ids; padding may hold any valid id.
            state: from the previous run; None starts anew. It is not changed and may be used again.
            mask: [B, S], 1 for real tokens, 0 for padding; all real by default.

        Returns:
            Logits in the model's own type, [B, S, V] or [B, 1, V] if the model gives only the last token's; and the
            new state.

        Raises:
            ModelError: an id is outside of the vocabulary, the model cannot express the padding or its fixed sizes do
                not fit, or it fails while running.
        """
        self._check(ids, mask)
        mask = np.ones(ids.shape, np.int64) if mask is None else np.asarray(mask, np.int64)
        mask_all = mask if state is None else np.concatenate([state.mask, mask], axis=1)
        if not self.signature.caches:
            return self._extend_uncached(ids, state, mask_all)
        past = state.length if state else 0
        if self.signature.in_place:
            return self._extend_in_place(ids, state, mask, mask_all)
        feeds = self._feeds(ids, mask_all, past)
        caches = state.caches if state else self._empty_caches(ids.shape[0])
        outputs = [self.signature.logits, *(pair.present for pair in self.signature.caches)]
        values = self.session.run_values({**feeds, **caches}, outputs)
        after = {pair.past: values[pair.present] for pair in self.signature.caches}
        return self._logits(values, ids), DecoderState(mask_all, after)

    def _extend_in_place(
        self, ids: Array, state: DecoderState | None, mask: Array, mask_all: Array
    ) -> tuple[Array, DecoderState]:
        """Run with the cache in buffers; a batch goes token by token once there is a past, see GroupQueryAttention."""
        batch, new = ids.shape
        past = state.length if state else 0
        if past and batch > 1 and new > 1:
            parts: list[Array] = []
            for i in range(new):
                logits, state = self.extend(ids[:, i : i + 1], state, mask[:, i : i + 1])
                parts.append(logits)
            assert state is not None
            return (parts[-1] if self.signature.last_token_only else np.concatenate(parts, axis=1)), state
        held = state.buffers if state is not None and state.buffers is not None else CacheBuffers()
        pairs = self.signature.caches
        buffers = held.room_for(self.session, pairs, batch, past, past + new)
        bound = {pair.past: (pair.present, buffers.values[pair.past]) for pair in pairs}
        buffers.filled = past + new
        values = self.session.run_in_place(self._feeds(ids, mask_all, past), [self.signature.logits], bound)
        return self._logits(values, ids), DecoderState(mask_all, buffers=buffers)

    def feeds(self, ids: Array, mask: Array | None = None) -> dict[str, Any]:
        """Values of all inputs for a first run over `ids` [B, S], for callers that want other outputs."""
        self._check(ids, mask)
        mask = np.ones(ids.shape, np.int64) if mask is None else mask
        return {**self._feeds(ids, mask, 0), **self._empty_caches(*ids.shape)}

    def step_feeds(self, ids: Array, state: DecoderState) -> dict[str, Any]:
        """Values of all inputs but the caches for a run over `ids` [B, S] after what `state` has seen."""
        mask = np.concatenate([state.mask, np.ones(ids.shape, np.int64)], axis=1)
        return self._feeds(ids, mask, state.length)

    def arrays(self, ids: Array, mask: Array | None = None) -> dict[str, Array]:
        """As `feeds`, as numpy arrays that own their memory."""
        return {name: self.session.array(value).copy() for name, value in self.feeds(ids, mask).items()}

    def is_causal(self) -> bool:
        """Whether earlier logits do not depend on later tokens; a model with a cache is causal by construction."""
        if self.signature.caches or self.signature.last_token_only:
            return True
        length = min(self.signature.length or _PROBE_TOKENS, _PROBE_TOKENS)
        if length < 2 or self.vocab < 2:
            return True
        ids = np.arange(length)[None].repeat(self.signature.batch or 1, 0) % self.vocab
        other = ids.copy()
        other[:, -1] = (other[:, -1] + self.vocab // 2) % self.vocab
        first, second = (self.extend(x)[0][:, :-1].astype(np.float64) for x in (ids, other))
        scale = float(np.abs(first).max()) or 1.0
        return bool(np.abs(first - second).max() <= _CAUSAL_TOLERANCE * scale)

    def _check(self, ids: Array, mask: Array | None) -> None:
        signature = self.signature
        if ids.ndim != 2 or 0 in ids.shape:
            raise UsageError(f"token ids must be [batch, sequence] and not empty, not {list(ids.shape)}")
        if mask is not None and signature.mask is None and not np.all(mask):
            raise ModelError("the model has no attention mask, so it cannot run padded text", where=self.session.where)
        if signature.batch not in (None, ids.shape[0]):
            raise ModelError(
                f"the model runs batches of {signature.batch}, not {ids.shape[0]}", where=self.session.where
            )
        if signature.caches and signature.length not in (None, ids.shape[1]):
            raise ModelError(
                f"the model runs exactly {signature.length} tokens at a time, not {ids.shape[1]}",
                where=self.session.where,
            )
        if self._vocab is not None and (ids.min() < 0 or ids.max() >= self._vocab):
            raise ModelError(
                f"token id {int(ids.max() if ids.max() >= self._vocab else ids.min())} is outside of the model's "
                f"vocabulary of {self._vocab}",
                where=self.session.where,
                todo="use the tokenizer that belongs to the model",
            )

    def _extend_uncached(self, ids: Array, state: DecoderState | None, mask: Array) -> tuple[Array, DecoderState]:
        """Run the whole text again; a fixed length is filled up on the right, which a causal model does not see."""
        whole = ids if state is None or state.ids is None else np.concatenate([state.ids, ids], axis=1)
        total, fixed = whole.shape[1], self.signature.length
        fed, fed_mask = whole, mask
        if fixed is not None:
            if total > fixed:
                raise ModelError(f"the model runs at most {fixed} tokens, not {total}", where=self.session.where)
            if self.signature.last_token_only and total < fixed:
                raise ModelError(f"the model gives logits only after {fixed} tokens", where=self.session.where)
            fed, fed_mask = (np.pad(x, ((0, 0), (0, fixed - total))) for x in (whole, mask))
        values = self.session.run_values(self._feeds(fed, fed_mask, 0), [self.signature.logits])
        logits = self._logits(values, fed)
        if not self.signature.last_token_only:
            logits = logits[:, total - ids.shape[1] : total]
        return logits, DecoderState(mask, ids=whole)

    def _logits(self, values: dict[str, Any], ids: Array) -> Array:
        logits = self.session.array(values[self.signature.logits])
        if logits.ndim == 2:
            logits = logits[:, None]
        if logits.ndim != 3 or logits.shape[1] not in (1, ids.shape[1]):
            raise ModelError(
                f"'{self.signature.logits}' has the shape {list(logits.shape)} for token ids {list(ids.shape)}",
                where=self.session.where,
            )
        return logits if self.signature.kept is None else self.signature.kept.spread(logits)

    def _empty_caches(self, batch: int, length: int = 0) -> dict[str, Any]:
        """Caches without tokens; buffers that are extended in place need room for `length` of them."""
        caches = {}
        for pair in self.signature.caches:
            shape = [0 if size is None else size for size in pair.shape]
            shape[pair.batch_axis] = batch
            if self.signature.in_place:
                shape[pair.sequence_axis] = length
            caches[pair.past] = self.session.empty(shape, pair.dtype)
        return caches

    def _feeds(self, ids: Array, mask: Array, past: int) -> dict[str, Any]:
        """Everything but the cache; `mask` [B, past + S] covers the past too."""
        signature = self.signature
        arrays: dict[str, Array] = {signature.ids: ids.astype(signature.ids_dtype)}
        if signature.mask is not None and signature.mask_dtype is not None:
            shaped = mask if signature.mask_rank == 2 else _square_mask(mask, past, signature.mask_dtype)
            arrays[signature.mask] = shaped.astype(signature.mask_dtype)
        if signature.positions is not None and signature.positions_dtype is not None:
            positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, past:]
            arrays[signature.positions] = positions.astype(signature.positions_dtype)
        for extra in signature.extras:
            arrays[extra.name] = _extra_value(extra, ids.shape, past, mask)
        return {name: self.session.value(array) for name, array in arrays.items()}


def _square_mask(mask: Array, past: int, dtype: np.dtype[Any]) -> Array:
    """[B, T] -> [B, 1, S, T]: causal, added to the scores if floating point, else true where visible."""
    total = mask.shape[1]
    causal = np.arange(total)[None, :] <= np.arange(past, total)[:, None]
    keep: Array = causal[None, None] & (mask[:, None, None, :] > 0)
    if dtype.kind in "biu":
        return keep
    lowest = ml_dtypes.finfo(dtype).min  # type: ignore[no-untyped-call]  # numpy's finfo refuses bfloat16
    added: Array = np.where(keep, np.zeros((), dtype), np.asarray(lowest, dtype))
    return added


def _extra_value(extra: Extra, shape: Sequence[int], past: int, mask: Array) -> Array:
    batch, length = shape
    total = past + length
    if extra.role == "zeros_like_ids":
        return np.zeros((batch, length), extra.dtype)
    if extra.role == "steps":
        return np.arange(past, total).astype(extra.dtype)
    if extra.role == "last_index":  # onnxruntime's GroupQueryAttention counts real tokens, minus one
        value: Array = (mask.sum(axis=1) - 1).astype(extra.dtype)
        return value if extra.rank < 2 else value[:, None]
    number = {"zero": 0, "has_past": past > 0, "past_length": past, "total_length": total}[extra.role]
    return np.full((1,) * extra.rank, number, extra.dtype)
