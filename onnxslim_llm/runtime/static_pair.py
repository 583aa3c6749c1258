"""Run a decoder that is two graphs of fixed sizes: one reads the prompt, the other writes token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.runtime.session import Array, Session
from onnxslim_llm.runtime.signature import CachePair, DecoderSignature, cache_slot, find_static

__all__ = ["StaticPair", "StaticState"]


@dataclass(frozen=True)
class StaticState:
    """What a pair has read so far.

    Attributes:
        length: Number of tokens.
        caches: By the name of the past input, as wide as the graph of a step takes them; the tokens are at the end,
            whatever fills the beginning is masked.
    """

    length: int
    caches: dict[str, Array]


class StaticPair:
    """Two graphs of one decoder, fed like one decoder with a cache that grows.

    The prompt stands at the beginning of the first graph's tokens, and the rest is masked. Its keys and values are
    moved to the end of the second graph's caches, which a step shifts by one: what is in front of them is masked.

    Args:
        prefill: Reads `length` tokens without a cache, and returns their keys and values.
        decode: Reads one token and caches of a fixed size.

    Raises:
        ModelError: The two are no such pair.
    """

    def __init__(self, prefill: Session, decode: Session) -> None:
        self.prefill_session, self.decode_session = prefill, decode
        self.signature = _signature(decode)
        self._reads = _signature(prefill)
        pair = self.signature.caches[0] if self.signature.caches else None
        if pair is None or self.signature.length != 1:
            raise ModelError("the graph of a step has no cache, or reads more than one token", where=decode.where)
        if self._reads.caches or self._reads.length is None or self._reads.last_token_only:
            what = "the graph of prompts has a cache, no fixed size, or logits of the last token only"
            raise ModelError(what, where=prefill.where)
        if (self.signature.batch or 1) != 1 or (self._reads.batch or 1) != 1:
            raise ModelError("pairs of graphs are run for a batch of 1 only", where=decode.where)
        self.length = self._reads.length
        self.room = pair.room or 0
        self._made = _presents(prefill, self.signature.caches)

    @property
    def where(self) -> str:
        """File of the graph of a step, for messages."""
        return self.decode_session.where

    @property
    def vocab(self) -> int:
        """Number of tokens that it knows; both graphs say it, their sizes being fixed."""
        return self.signature.vocab or 0

    @property
    def context_length(self) -> int:
        """Largest number of tokens that it reads: full caches, and the one in work."""
        return self.room + 1

    def prefill(
        self, ids: Array, state: StaticState | None = None, *, chunk: int | None = None
    ) -> tuple[Array, StaticState]:
        """Run `ids` [1, S] after `state`: as much of a new text as fits at once, everything else token by token.

        Returns:
            Logits [1, S, V], and the new state.

        Raises:
            UsageError: There are no tokens, or more than the caches hold.
            ModelError: The model fails while running.
        """
        if ids.ndim != 2 or ids.shape[0] != 1 or not ids.shape[1]:
            raise UsageError(f"token ids must be [1, sequence] and not empty, not {list(ids.shape)}")
        seen = 0 if state is None else state.length
        if seen + ids.shape[1] > self.context_length:
            what = f"{seen + ids.shape[1]} tokens do not fit into caches of {self.room}, with one more in work"
            raise UsageError(what, where=self.where, todo="compile with a larger past in --shape decode:past=SIZE")
        parts: list[Array] = []
        start = 0
        if state is None:
            start = min(ids.shape[1], self.length)
            logits, state = self._read(ids[:, :start])
            parts.append(logits)
        for i in range(start, ids.shape[1]):
            logits, state = self._step(ids[:, i : i + 1], state)
            parts.append(logits)
        return np.concatenate(parts, axis=1), state

    def _read(self, ids: Array) -> tuple[Array, StaticState]:
        count = ids.shape[1]
        padded = np.pad(ids, ((0, 0), (0, self.length - count)))
        mask = (np.arange(self.length) < count).astype(np.int64)[None]
        feeds = _feeds(self._reads, padded, mask, np.arange(self.length)[None])
        names = [self._reads.logits, *self._made.values()]
        values = self.prefill_session.run(feeds, names)
        caches = {}
        for pair in self.signature.caches:
            kept = min(count, self.room)
            made = values[self._made[pair.past]]
            caches[pair.past] = self._at_the_end(pair, _along(made, pair, slice(count - kept, count)))
        return values[self._reads.logits][:, :count], StaticState(count, caches)

    def _step(self, ids: Array, state: StaticState) -> tuple[Array, StaticState]:
        signature = self.signature
        seen = min(state.length, self.room)
        mask = (np.arange(self.room + 1) >= self.room - seen).astype(np.int64)[None]
        feeds = {**_feeds(signature, ids, mask, np.array([[state.length]])), **state.caches}
        names = [signature.logits, *(pair.present for pair in signature.caches)]
        values = self.decode_session.run(feeds, names)
        caches = {
            pair.past: np.ascontiguousarray(_along(values[pair.present], pair, slice(1, None)))
            for pair in signature.caches
        }
        logits = values[signature.logits]
        return (logits[:, None] if logits.ndim == 2 else logits), StaticState(state.length + 1, caches)

    def _at_the_end(self, pair: CachePair, filled: Array) -> Array:
        widths = [(0, 0)] * filled.ndim
        widths[pair.sequence_axis] = (self.room - filled.shape[pair.sequence_axis], 0)
        return np.pad(filled, widths)


def _signature(session: Session) -> DecoderSignature:
    signature, why = find_static(session)
    if signature is None:
        raise ModelError(f"not a decoder of fixed sizes: {why}", where=session.where)
    unknown = next((extra.name for extra in signature.extras), signature.mask if signature.mask_rank != 2 else None)
    if unknown is not None:
        raise ModelError(f"its input '{unknown}' has no meaning for caches of a fixed size", where=session.where)
    return signature


def _presents(prefill: Session, caches: tuple[CachePair, ...]) -> dict[str, str]:
    """Return the outputs of the first graph that fill the caches of the second, by the name of the past input."""
    slots = {cache_slot(info.name): info.name for info in prefill.outputs}
    found = {pair.past: slots.get(cache_slot(pair.present), "") for pair in caches}
    for past, present in found.items():
        if not present:
            raise ModelError(f"the graph of prompts has no output that fills '{past}'", where=prefill.where)
    return found


def _along(values: Array, pair: CachePair, part: slice) -> Array:
    return values[(slice(None),) * pair.sequence_axis + (part,)]


def _feeds(signature: DecoderSignature, ids: Array, mask: Array, positions: Array) -> dict[str, Any]:
    feeds = {signature.ids: ids.astype(signature.ids_dtype)}
    if signature.mask is not None and signature.mask_dtype is not None:
        feeds[signature.mask] = mask.astype(signature.mask_dtype)
    if signature.positions is not None and signature.positions_dtype is not None:
        feeds[signature.positions] = positions.astype(signature.positions_dtype)
    return feeds
