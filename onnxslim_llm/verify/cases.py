"""The single runs that a comparison is made of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnxslim_llm.errors import ModelError
from onnxslim_llm.runtime.feeds import index_bounds, random_feeds, sizes_of
from onnxslim_llm.runtime.session import Array, Session
from onnxslim_llm.runtime.signature import DecoderSignature

__all__ = ["SEED", "STEPS", "DecoderCase", "TensorCase", "decoder_cases", "fit_length", "tensor_cases"]

SEED = 20240
STEPS = 4  # single tokens after a prompt
_BATCH, _LENGTH = 2, 8
# Longer inputs are tried when a model refuses short ones (convolutions and pooling need a minimum).
_LENGTHS = (_LENGTH, 32, 224)


@dataclass(frozen=True)
class DecoderCase:
    """Pieces of text that run one after another, each with the cache that the previous one left.

    Attributes:
        pieces: (ids, mask) pairs, both [B, S] int64; the mask is 1 at real tokens, the only ones that are compared.
    """

    name: str
    pieces: tuple[tuple[Array, Array], ...]


@dataclass(frozen=True)
class TensorCase:
    """One run: an array for every input."""

    name: str
    feeds: dict[str, Array]


def decoder_cases(
    signature: DecoderSignature, rows: Iterator[Array], length: int, *, stepwise: bool = False
) -> tuple[list[DecoderCase], list[tuple[str, str]]]:
    """The cases that `signature` allows: batches, padding on both sides, steps and chunks with a cache.

    Args:
        signature: of the source.
        rows: token ids, each row at least `length` + 4 long.
        length: tokens of a prompt.
        stepwise: steps and chunks for a source without a cache, too: it reads the whole text again for each of them.

    Returns:
        The cases, and (case, reason) for those that the model cannot run.
    """
    cases: list[DecoderCase] = []
    skipped: list[tuple[str, str]] = []
    length = fit_length(signature, length)
    batch = signature.batch or _BATCH
    unit = signature.length or 1

    def block(count: int, tokens: int) -> Array:
        return np.stack([next(rows)[:tokens] for _ in range(count)])

    def add(name: str, ids: Array, lengths: Sequence[int], mask: Array | None = None) -> None:
        mask = np.ones_like(ids) if mask is None else mask
        cuts = np.cumsum([0, *lengths])
        pieces = tuple((ids[:, a:b], mask[:, a:b]) for a, b in itertools.pairwise(cuts))
        cases.append(DecoderCase(name, pieces))

    if signature.batch in (None, 1):
        add("prompt", block(1, length), [length])
    if batch > 1:
        add(f"prompt, batch {batch}", block(batch, length), [length])
    pad = fit_length(signature, max(1, length // 3)) if signature.caches else max(1, length // 3)
    if signature.mask is None:
        skipped += [("left padding", "no attention mask input"), ("right padding", "no attention mask input")]
    elif pad < length:
        left = np.ones((batch, length), np.int64)
        left[-1, :pad] = 0
        add("left padding", block(batch, length), [length], left)
        if signature.last_token_only:
            skipped.append(("right padding", "only the last token has logits"))
        else:
            add("right padding", block(batch, length), [length], left[:, ::-1].copy())
    if not signature.caches and not (stepwise and signature.length is None and not signature.last_token_only):
        skipped.append(("steps and chunks with a filled cache", "no cache inputs"))
        return cases, skipped
    steps = [unit] * STEPS if unit == 1 else [unit]
    add("steps after a prompt", block(batch, length + sum(steps)), [length, *steps])
    third = fit_length(signature, max(1, length // 3))
    if 2 * third < length:
        add("chunks", block(batch, length), [third, third, length - 2 * third])
    if signature.mask is not None and pad < length:
        mask = np.ones((batch, length + sum(steps)), np.int64)
        mask[-1, :pad] = 0
        add("steps after left padding", block(batch, length + sum(steps)), [length, *steps], mask)
    return cases, skipped


def fit_length(signature: DecoderSignature, wanted: int) -> int:
    """The nearest number of tokens that a model of fixed length can run."""
    fixed = signature.length
    if fixed is None:
        return wanted
    return max(fixed, wanted // fixed * fixed) if signature.caches else min(fixed, wanted)


def tensor_cases(
    session: Session, proto: onnx.ModelProto | None = None
) -> tuple[list[TensorCase], list[tuple[str, str]]]:
    """Random inputs in two shapes, tried on the model itself; sizes grow until it accepts them.

    Raises:
        ModelError: an input's type cannot be generated, or the model runs none of the inputs.
    """
    bounds = index_bounds(proto) if proto is not None else {}
    skipped: list[tuple[str, str]] = []
    failure: ModelError | None = None
    for length in _LENGTHS:
        cases: list[TensorCase] = []
        for batch, size in ((1, length), (_BATCH, length + length // 2)):
            name = f"random, batch {batch}, length {size}"
            sizes = sizes_of(session.inputs, batch=batch, length=size)
            rng = np.random.default_rng((SEED, batch, size))
            feeds = random_feeds(session.inputs, sizes, rng, batch=batch, length=size, bounds=bounds)
            if cases and _shapes(feeds) == _shapes(cases[0].feeds):
                name = "random, other values"
            try:
                session.run(feeds)
            except ModelError as error:
                failure = error
                skipped.append((name, error.what))
            else:
                cases.append(TensorCase(name, feeds))
        if cases:
            return cases, skipped
    raise ModelError(
        f"the model runs none of the inputs that were made up: {failure.what if failure else ''}",
        where=failure.where if failure else session.where,
        todo="give real inputs: --calib FILE.npz with one array per input name",
    )


def _shapes(feeds: Mapping[str, Array]) -> list[tuple[int, ...]]:
    return [array.shape for array in feeds.values()]
