"""Encoders and the parts of encoder-decoders: batches, lengths, masks with padding and holes, greedy text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxslim_llm.errors import SlimError
from onnxslim_llm.runtime.session import Array, Session, TensorInfo
from zoo.equality import CaseResult, Equality, delta
from zoo.families import VOCAB
from zoo.seq2seq_greedy import generated

__all__ = ["GREEDY_TOKENS", "compare"]

GREEDY_TOKENS = 64
_SEED = 13
_BATCHES = (1, 2, 3)
_MASKS = ("full", "left padding", "right padding", "holes")
_PAD = 3
_SHORTEST = 6
# What a fixed front end takes, where the graph's dimensions are free all the same.
_FRONT_ENDS = {"input_features": (16, 3000), "pixel_values": (3, 32, 32)}
_TOKENS = ("input_ids", "decoder_input_ids")


def compare(source: Session, candidate: Session) -> Equality:
    """As `equality.compare` for models that are no decoders with known inputs."""
    rng = np.random.default_rng(_SEED)
    results: list[CaseResult] = []
    skipped: list[tuple[str, str]] = []
    for name, feeds in _cases(source, rng):
        try:
            expected = source.run(feeds)
        except SlimError as error:
            skipped.append((name, f"the source fails: {error.what}"))
            continue
        try:
            got = candidate.run(feeds)
        except SlimError as error:
            results.append(CaseResult(name, float("inf"), error.what))
            continue
        mask = feeds.get("attention_mask")
        deltas = {key: delta(expected[key], got[key], _rows(expected[key], mask)) for key in expected}
        broken = [key for key, value in deltas.items() if np.isnan(value)]
        if broken:
            skipped.append((name, f"the source's {broken[0]} is not finite"))
            continue
        worst = max(deltas, key=deltas.__getitem__)
        results.append(CaseResult(name, deltas[worst], worst))
    first = next((feeds for _, feeds in _cases(source, rng)), None)
    match, tokens = 1.0, 0
    if first is not None and any(info.name == "logits" for info in source.outputs):
        mine, theirs = (generated(session, first, GREEDY_TOKENS) for session in (source, candidate))
        tokens = mine.size
        differs = np.flatnonzero((mine != theirs).any(axis=0))
        match = float(differs[0] / mine.shape[1]) if differs.size else 1.0
    return Equality(tuple(results), tuple(skipped), tokens, match)


def _rows(output: Array, mask: Array | None) -> Array | None:
    """Rows of real tokens, of an output that has one row a token or one that was pooled from the first token."""
    if mask is None or output.ndim < 2:
        return None
    if output.shape[:2] == mask.shape:
        return mask
    return mask[:, 0] if output.ndim == 2 and output.shape[0] == mask.shape[0] else None


def _cases(session: Session, rng: np.random.Generator) -> Iterator[tuple[str, dict[str, Array]]]:
    names = [info.name for info in session.inputs]
    branches = [True, False] if "use_cache_branch" in names else [None]
    masks = _MASKS if any("mask" in name for name in names) else _MASKS[:1]
    for branch in branches:
        for batch in _BATCHES:
            for mask in masks if batch == _BATCHES[-1] else masks[:1]:
                sizes = _sizes(session, batch, branch)
                feeds = {info.name: _array(info, sizes, batch, mask, rng, branch) for info in session.inputs}
                suffix = "" if branch is None else f", use_cache_branch {branch}"
                yield f"batch {batch}, {mask}{suffix}", feeds


def _sizes(session: Session, batch: int, branch: bool | None) -> dict[str, int]:
    """A different size for every named dimension, so that a mix-up fails; one token a step with a cache."""
    sizes: dict[str, int] = {}
    stepwise = branch is True or (branch is None and any(i.name.startswith("past_key_values") for i in session.inputs))
    for info in session.inputs:
        for axis, dim in enumerate(info.shape or ()):
            if isinstance(dim, str) and dim not in sizes:
                if axis == 0:
                    sizes[dim] = batch
                elif stepwise and info.name in _TOKENS:
                    sizes[dim] = 1
                else:
                    sizes[dim] = _SHORTEST + 3 * len(sizes)
    return sizes


def _array(
    info: TensorInfo, sizes: dict[str, int], batch: int, mask: str, rng: np.random.Generator, branch: bool | None
) -> Array:
    if info.name in _FRONT_ENDS:
        return rng.standard_normal((batch, *_FRONT_ENDS[info.name]), dtype=np.float32)
    shape = [sizes[dim] if isinstance(dim, str) else int(dim or batch) for dim in info.shape or ()]
    if info.name == "use_cache_branch":
        return np.full(shape, branch)
    if "mask" in info.name:
        return _mask(mask, shape).astype(info.dtype)
    if info.name in _TOKENS:
        return rng.integers(3, VOCAB, shape)
    if info.name == "token_type_ids":
        return rng.integers(0, 2, shape)
    assert info.dtype is not None
    assert info.dtype.kind == "f", f"no values are known for the input {info.name}"
    return rng.standard_normal(shape, dtype=np.float32).astype(info.dtype)


def _mask(kind: str, shape: list[int]) -> Array:
    """The last row is padded, the others are not."""
    mask = np.ones(shape, np.int64)
    if kind == "left padding":
        mask[-1, :_PAD] = 0
    elif kind == "right padding":
        mask[-1, -_PAD:] = 0
    elif kind == "holes":
        mask[-1, 1::2] = 0
    return mask
