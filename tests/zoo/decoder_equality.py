"""Decoders: batches, empty and filled caches, chunks, padding, position ids, greedy text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnxslim_llm.errors import SlimError
from onnxslim_llm.runtime.decoder import DecoderRunner, DecoderState
from onnxslim_llm.runtime.session import Array, Session
from onnxslim_llm.runtime.signature import DecoderSignature
from onnxslim_llm.verify.greedy import greedy_match
from zoo.equality import CaseResult, Equality, delta

__all__ = ["GREEDY_TOKENS", "compare"]

GREEDY_TOKENS = 64
_SEED = 11
# Longer than the windows of the zoo (8), and the padding shorter than the text.
_LENGTH, _PAD = 13, 4
_STEPS = (1, 1)


@dataclass(frozen=True)
class _Case:
    """Pieces of text that run one after another; `offset` shifts the position ids of the first run.

    Attributes:
        mask: [B, T], 1 for real tokens.
        lengths: tokens of each piece.
    """

    name: str
    mask: Array
    lengths: Sequence[int]


def compare(source: Session, candidate: Session, signature: DecoderSignature) -> Equality:
    """As `equality.compare` for decoders."""
    runners = DecoderRunner(source, signature), DecoderRunner(candidate, signature)
    rng = np.random.default_rng(_SEED)
    vocab = runners[0].vocab
    results: list[CaseResult] = []
    skipped: list[tuple[str, str]] = []

    def record(name: str, found: CaseResult | str) -> None:
        if isinstance(found, str):
            skipped.append((name, found))
        else:
            results.append(found)

    for case in _cases(signature, skipped):
        ids = rng.integers(3, vocab, case.mask.shape)
        record(case.name, _run(*runners, case, ids))
    if signature.positions is None:
        skipped.append(("odd positions", "no position input"))
    else:
        for name, positions in _odd_positions():
            ids = rng.integers(3, vocab, positions.shape)
            record(name, _run_positions(*runners, name, ids, positions))
    prompts = rng.integers(3, vocab, (2, 5))
    text = greedy_match(*runners, prompts, GREEDY_TOKENS, tie_margin=0.0)
    return Equality(tuple(results), tuple(skipped), GREEDY_TOKENS, text.prefix_match)


def _cases(signature: DecoderSignature, skipped: list[tuple[str, str]]) -> Iterator[_Case]:
    total = _LENGTH + sum(_STEPS)
    for batch in (1, 2, 3):
        yield _Case(f"prompt, batch {batch}", np.ones((batch, _LENGTH), np.int64), [_LENGTH])
    yield _Case("one token", np.ones((2, 1), np.int64), [1])
    if signature.caches:
        for batch in (1, 2, 3):
            yield _Case(f"steps, batch {batch}", np.ones((batch, total), np.int64), [_LENGTH, *_STEPS])
        for batch in (1, 2):
            yield _Case(f"chunks, batch {batch}", np.ones((batch, total), np.int64), [4, 6, total - 10])
    else:
        skipped.append(("steps and chunks", "no cache"))
    if signature.mask is None:
        skipped.append(("padding", "no attention mask"))
        return
    for side, mask in (("left", _padded(2, total, left=True)), ("right", _padded(2, total, left=False))):
        yield _Case(f"{side} padding", mask[:, :_LENGTH], [_LENGTH])
        if signature.caches:
            yield _Case(f"steps after {side} padding", mask, [_LENGTH, *_STEPS])
            yield _Case(f"chunks with {side} padding", mask, [6, total - 6])
    yield _Case(
        "left padding, batch 1", _padded(1, total, left=True), [_LENGTH, *_STEPS] if signature.caches else [total]
    )


def _padded(batch: int, total: int, *, left: bool) -> Array:
    """The last row's prompt begins or ends with padding, the tokens after the prompt are real."""
    mask = np.ones((batch, total), np.int64)
    mask[-1, slice(0, _PAD) if left else slice(_LENGTH - _PAD, _LENGTH)] = 0
    return mask


def _odd_positions() -> Iterator[tuple[str, Array]]:
    """Positions whose distances do not follow from the mask: a rule that derives them itself shows."""
    steps = np.arange(_LENGTH)
    yield "every second position", np.tile(2 * steps, (2, 1))
    yield "positions that start again", np.stack([steps % 7, steps[::-1]])


def _run(source: DecoderRunner, candidate: DecoderRunner, case: _Case, ids: Array) -> CaseResult | str:
    worst = 0.0
    states: list[DecoderState | None] = [None, None]
    for a, b in itertools.pairwise(np.cumsum([0, *case.lengths])):
        try:
            expected, states[0] = source.extend(ids[:, a:b], states[0], case.mask[:, a:b])
        except SlimError as error:
            return f"the source fails: {error.what}"
        try:
            got, states[1] = candidate.extend(ids[:, a:b], states[1], case.mask[:, a:b])
        except SlimError as error:
            return CaseResult(case.name, float("inf"), error.what)
        rows = case.mask[:, b - 1 : b] if source.signature.last_token_only else case.mask[:, a:b]
        worst = max(worst, delta(expected, got, rows), key=_nan_first)
        worst = max(worst, _cache_delta(source, states, case.mask[:, :b]), key=_nan_first)
        if np.isnan(worst):
            return "the source's result is not finite"
    return CaseResult(case.name, worst)


def _cache_delta(source: DecoderRunner, states: Sequence[DecoderState | None], mask: Array) -> float:
    """Difference of the caches at real tokens, of those that hold one entry a token."""
    worst = 0.0
    if states[0] is None or states[1] is None:
        return worst
    for pair in source.signature.caches:
        mine, theirs = (source.session.array(state.caches[pair.past]) for state in states if state is not None)
        if mine.ndim > pair.sequence_axis and mine.shape[pair.sequence_axis] == mask.shape[1]:
            mine, theirs = (
                np.moveaxis(array, (pair.batch_axis, pair.sequence_axis), (0, 1)) if array.ndim == mine.ndim else array
                for array in (mine, theirs)
            )
            worst = max(worst, delta(mine, theirs, mask), key=_nan_first)
    return worst


def _nan_first(value: float) -> float:
    return float("inf") if np.isnan(value) else value


def _run_positions(
    source: DecoderRunner, candidate: DecoderRunner, name: str, ids: Array, positions: Array
) -> CaseResult | str:
    signature = source.signature
    outputs = []
    for runner in (source, candidate):
        feeds = runner.feeds(ids)
        assert signature.positions is not None
        assert signature.positions_dtype is not None
        feeds[signature.positions] = runner.session.value(positions.astype(signature.positions_dtype))
        try:
            values = runner.session.run_values(feeds, [signature.logits])
        except SlimError as error:
            if runner is source:
                return f"the source fails: {error.what}"
            return CaseResult(name, float("inf"), error.what)
        outputs.append(runner.session.array(values[signature.logits]))
    worst = delta(*outputs)
    return "the source's result is not finite" if np.isnan(worst) else CaseResult(name, worst)
