"""Recognise a causal decoder by its inputs and outputs, whoever exported it.

Known name families: Optimum and onnxruntime-genai (`past_key_values.0.key` -> `present.0.key`), older exports
(`past_key_0`, `pastkv.0.k`), GPT-2 style pairs (`past_0` [2, B, H, S, D]), and models without a cache.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import onnx

from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.kept_tokens import KeptTokens
from onnxslim_llm.ir.metadata import IN_PLACE_CACHE
from onnxslim_llm.runtime.head_size import declared_head_size
from onnxslim_llm.runtime.session import Dim, Session, TensorInfo, inputs_of, outputs_of

__all__ = ["CachePair", "DecoderSignature", "Extra", "cache_slot", "find_decoder", "find_static"]

_IDS = ("input_ids", "token_ids", "tokens", "ids")
_MASK = ("attention_mask", "mask", "attn_mask")
_POSITIONS = ("position_ids", "positions", "pos_ids")
_LOGITS = ("logits", "lm_logits")

ExtraRole = Literal["zeros_like_ids", "zero", "has_past", "steps", "past_length", "total_length", "last_index"]

# Inputs beside the usual ones whose value follows from the step alone.
_EXTRAS: dict[str, ExtraRole] = {
    "token_type_ids": "zeros_like_ids",
    "num_logits_to_keep": "zero",  # 0 keeps the logits of every token
    "logits_to_keep": "zero",
    "use_cache_branch": "has_past",
    "cache_position": "steps",
    "past_sequence_length": "past_length",
    "past_seq_len": "past_length",
    "total_sequence_length": "total_length",
    "total_seq_len": "total_length",
    "seqlens_k": "last_index",
}

_PAST_WORD = re.compile(r"past|cache|kv|pkv", re.IGNORECASE)
_PRESENT_WORD = re.compile(r"present|cache|kv|past|updated|new", re.IGNORECASE)
_FAMILY = re.compile(r"past_key_values?|present_key_values?|key_value_cache|kv_cache|pastkv|presentkv", re.IGNORECASE)
_PART = re.compile(r"(?<![a-z])(key|value|k|v)s?(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class CachePair:
    """One cache tensor: the past input and the present output that becomes it in the next step.

    Attributes:
        shape: of the past input, with None at `batch_axis` and `sequence_axis`.
        room: tokens that the past input holds where that is fixed, see `find_static`; None where it grows.
    """

    past: str
    present: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]
    batch_axis: int
    sequence_axis: int
    room: int | None = None


@dataclass(frozen=True)
class Extra:
    """A further input that `DecoderRunner` fills by its role; `rank` is 0, 1 or 2."""

    name: str
    role: ExtraRole
    dtype: np.dtype[Any]
    rank: int


@dataclass(frozen=True)
class DecoderSignature:
    """Which input and output of a decoder plays which part.

    Attributes:
        ids, mask, positions: inputs; token ids are [B, S], the mask [B, past + S] (or [B, 1, S, past + S], `mask_rank`
            4), positions [B, S]. None where the model has no such input.
        caches: past/present pairs, empty for a model that sees the whole text in every run.
        logits: output [B, S, V], or [B, 1, V] / [B, V] of the last token only if `last_token_only`.
        vocab: size of the vocabulary, None if the graph does not say it.
        in_place: a cache input and the output that continues it are one buffer, longer than what it holds.
        kept: the tokens of the vocabulary that the model still knows, None if that is all of them.
        batch, length: fixed batch size or number of tokens of a run, None if free.
    """

    ids: str
    ids_dtype: np.dtype[Any]
    logits: str
    mask: str | None = None
    mask_dtype: np.dtype[Any] | None = None
    mask_rank: int = 2
    positions: str | None = None
    positions_dtype: np.dtype[Any] | None = None
    caches: tuple[CachePair, ...] = ()
    extras: tuple[Extra, ...] = ()
    vocab: int | None = None
    last_token_only: bool = False
    in_place: bool = False
    kept: KeptTokens | None = None
    batch: int | None = None
    length: int | None = None

    @classmethod
    def of(cls, model: Session | onnx.ModelProto) -> DecoderSignature:
        """Return the signature.

        Raises:
            ModelError: the model is no causal decoder that can be run; says why.
        """
        found, why = find_decoder(model)
        if found is None:
            where = model.where if isinstance(model, Session) else ""
            raise ModelError(f"not a decoder that can be run: {why}", where=where)
        return found


class _RefusalError(Exception):
    """Why a model is no decoder; never leaves this file."""


def find_decoder(model: Session | onnx.ModelProto) -> tuple[DecoderSignature | None, str]:
    """Return the signature and "", or None and the reason why the model is not a decoder.

    A model without a cache is accepted on its names and shapes; whether it is causal shows only when it runs
    (`DecoderRunner.is_causal`).
    """
    try:
        head_size = declared_head_size(model.where) if isinstance(model, Session) else None
        signature = _match(inputs_of(model), outputs_of(model), head_size)
        metadata = _metadata(model)
        kept = KeptTokens.from_metadata(metadata)
        vocab = signature.vocab if kept is None else kept.vocabulary
        return replace(signature, in_place=IN_PLACE_CACHE in metadata, kept=kept, vocab=vocab), ""
    except _RefusalError as refusal:
        return None, str(refusal)


def find_static(model: Session | onnx.ModelProto) -> tuple[DecoderSignature | None, str]:
    """As `find_decoder`, of a decoder with caches of a fixed size: past [.., P, ..] becomes present [.., P + S, ..]."""
    try:
        return _match(inputs_of(model), outputs_of(model), None, static=True), ""
    except _RefusalError as refusal:
        return None, str(refusal)


def _metadata(model: Session | onnx.ModelProto) -> dict[str, str]:
    if isinstance(model, Session):
        return model.metadata()
    return {entry.key: entry.value for entry in model.metadata_props}


def _match(
    inputs: tuple[TensorInfo, ...], outputs: tuple[TensorInfo, ...], head_size: int | None, static: bool = False
) -> DecoderSignature:
    ids = _token_ids(inputs)
    mask, positions = _one(inputs, _MASK), _one(inputs, _POSITIONS)
    named = {info.name for info in (ids, mask, positions) if info}
    extras = tuple(_extra(i) for i in inputs if i.name in _EXTRAS)
    named |= {extra.name for extra in extras}
    rest = [i for i in inputs if i.name not in named]
    for info in rest:
        if "encoder" in info.name:
            raise _RefusalError(f"input '{info.name}' belongs to an encoder-decoder model")
        if not _PAST_WORD.search(info.name):
            raise _RefusalError(f"input '{info.name}' is none that a decoder has")
    caches, presents = _pair(rest, outputs, head_size, static)
    logits = _logits(outputs, presents, bool(caches))
    _check_types(ids, mask, positions)
    id_dims, logit_dims = ids.shape or (None, None), logits.shape or ()
    batch = id_dims[0] if isinstance(id_dims[0], int) else None
    length = id_dims[1] if isinstance(id_dims[1], int) else None
    short = len(logit_dims) == 2 or (len(logit_dims) == 3 and logit_dims[1] == 1 and length != 1)
    return DecoderSignature(
        ids=ids.name,
        ids_dtype=_dtype(ids),
        logits=logits.name,
        mask=mask.name if mask else None,
        mask_dtype=mask.dtype if mask else None,
        mask_rank=(mask.rank or 2) if mask else 2,
        positions=positions.name if positions else None,
        positions_dtype=positions.dtype if positions else None,
        caches=caches,
        extras=extras,
        vocab=logit_dims[-1] if logit_dims and isinstance(logit_dims[-1], int) else None,
        last_token_only=short,
        batch=batch,
        length=length,
    )


def _one(infos: tuple[TensorInfo, ...], names: tuple[str, ...]) -> TensorInfo | None:
    by_name = {info.name: info for info in infos}
    return next((by_name[name] for name in names if name in by_name), None)


def _dtype(info: TensorInfo) -> np.dtype[Any]:
    if info.dtype is None:
        raise _RefusalError(f"'{info.name}' has the type {info.kind}")
    return info.dtype


def _token_ids(inputs: tuple[TensorInfo, ...]) -> TensorInfo:
    ids = _one(inputs, _IDS)
    if ids is None:
        names = [info.name for info in inputs]
        if "inputs_embeds" in names:
            raise _RefusalError("it takes inputs_embeds, not token ids")
        raise _RefusalError(f"it has no token id input (input_ids), only {', '.join(names[:4]) or 'none at all'}")
    if _dtype(ids).kind not in "iu" or ids.rank not in (2, None):
        raise _RefusalError(f"input '{ids.name}' is {ids.kind} {list(ids.shape or ())}, not integers [batch, sequence]")
    return ids


def _check_types(ids: TensorInfo, mask: TensorInfo | None, positions: TensorInfo | None) -> None:
    if mask and (_dtype(mask).kind not in "iubf" or mask.rank not in (2, 4, None)):
        raise _RefusalError(f"input '{mask.name}' is {mask.kind} {list(mask.shape or ())}, not [batch, total]")
    if positions and (_dtype(positions).kind not in "iu" or positions.rank not in (2, None)):
        raise _RefusalError(f"input '{positions.name}' is {positions.kind} {list(positions.shape or ())}")


def _extra(info: TensorInfo) -> Extra:
    return Extra(info.name, _EXTRAS[info.name], _dtype(info), len(info.shape or ()))


def cache_slot(name: str) -> tuple[int, str] | None:
    """(layer, "key" | "value" | "") of a cache tensor's name, None if it has no layer number."""
    short = _FAMILY.sub("", name)
    number = re.search(r"\d+", short)
    if number is None:
        return None
    part = _PART.search(short)
    return int(number.group()), {"k": "key", "v": "value"}[part.group(1)[0].lower()] if part else ""


def _pair(
    rest: list[TensorInfo], outputs: tuple[TensorInfo, ...], head_size: int | None, static: bool
) -> tuple[tuple[CachePair, ...], frozenset[str]]:
    """Match past inputs with present outputs; the second result names all outputs that look like a cache."""
    presents: dict[tuple[int, str], TensorInfo] = {}
    for info in outputs:
        key = cache_slot(info.name) if _PRESENT_WORD.search(info.name) else None
        if key is not None and info.name not in _LOGITS:
            presents.setdefault(key, info)
    pairs: list[CachePair] = []
    for info in rest:
        key = cache_slot(info.name)
        if key is None or key not in presents:
            raise _RefusalError(f"cache input '{info.name}' has no output that continues it")
        pair = _static_cache(info, presents[key]) if static else _cache(info, presents[key], head_size)
        pairs.append(pair)
    return tuple(pairs), frozenset(info.name for info in presents.values())


def _cache(past: TensorInfo, present: TensorInfo, head_size: int | None) -> CachePair:
    dims, after = past.shape or (), present.shape or ()
    if len(dims) not in (3, 4, 5):
        raise _RefusalError(f"cache input '{past.name}' has the shape {list(dims)}")
    batch = 1 if len(dims) == 5 and dims[0] == 2 else 0
    known: list[Dim] = [d if isinstance(d, int) or len(after) != len(dims) else after[i] for i, d in enumerate(dims)]
    if len(known) == 4 and not isinstance(known[-1], int):
        known[-1] = head_size
    free = [i for i, d in enumerate(known) if i != batch and not isinstance(d, int)]
    if not free:
        raise _RefusalError(f"cache input '{past.name}' has a fixed size {list(dims)}: static caches are not run yet")
    if len(free) > 1:
        raise _RefusalError(f"cache input '{past.name}' has several unknown dimensions {list(dims)}")
    sequence = free[0]
    shape = tuple(None if i in (batch, sequence) or not isinstance(d, int) else d for i, d in enumerate(known))
    return CachePair(past.name, present.name, _dtype(past), shape, batch, sequence)


def _static_cache(past: TensorInfo, present: TensorInfo) -> CachePair:
    dims, after = past.shape or (), present.shape or ()
    if len(dims) != len(after) or not all(isinstance(size, int) for size in (*dims, *after)):
        raise _RefusalError(f"cache input '{past.name}' has no fixed size: {list(dims)}")
    grown = [i for i, (a, b) in enumerate(zip(dims, after, strict=True)) if a != b]
    if len(grown) != 1:
        raise _RefusalError(f"'{present.name}' {list(after)} is no continuation of '{past.name}' {list(dims)}")
    batch = 1 if len(dims) == 5 and dims[0] == 2 else 0
    shape = tuple(None if i in (batch, grown[0]) else int(size or 0) for i, size in enumerate(dims))
    return CachePair(past.name, present.name, _dtype(past), shape, batch, grown[0], int(dims[grown[0]] or 0))


def _logits(outputs: tuple[TensorInfo, ...], presents: frozenset[str], cached: bool) -> TensorInfo:
    logits = _one(outputs, _LOGITS)
    if logits is None:
        # Without the name, only a cache proves that a float output of rank 3 are logits.
        likely = [o for o in outputs if o.name not in presents and o.rank == 3 and "hidden" not in o.name]
        if not cached or len(likely) != 1:
            raise _RefusalError(f"it has no output 'logits', only {', '.join(o.name for o in outputs[:4])}")
        logits = likely[0]
    if _dtype(logits).kind not in "fV":
        raise _RefusalError(f"output '{logits.name}' is {logits.kind}, not floating point")
    if logits.rank not in (3, None) and not (logits.rank == 2 and cached):
        raise _RefusalError(
            f"output '{logits.name}' has the shape {list(logits.shape or ())}, not [batch, sequence, vocabulary]"
        )
    return logits
