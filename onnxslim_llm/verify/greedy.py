"""How long two decoders write the same text when both always take the likeliest token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxslim_llm.errors import ModelError
from onnxslim_llm.runtime.session import Array
from onnxslim_llm.verify.predictor import Predictor
from onnxslim_llm.verify.vocabulary import CommonTokens

__all__ = ["GreedyMatch", "greedy_match"]


@dataclass(frozen=True)
class GreedyMatch:
    """Result of one greedy comparison.

    Attributes:
        tokens: length of each continuation.
        first_divergence: per prompt, index of the first token that differs, None if none does.
        ties: tokens where the models differ although the source ranks both choices equal within the margin.
    """

    tokens: int
    first_divergence: tuple[int | None, ...]
    ties: int

    @property
    def prefix_match(self) -> float:
        """Mean share of the continuation before the first difference; 1.0 means identical texts."""
        if not self.first_divergence or not self.tokens:
            return 1.0
        return float(np.mean([1.0 if i is None else i / self.tokens for i in self.first_divergence]))


def greedy_match(
    source: Predictor,
    artifact: Predictor,
    prompts: Array,
    tokens: int,
    *,
    tie_margin: float,
    progress: Callable[[int], None] | None = None,
) -> GreedyMatch:
    """Continue `prompts` [N, T] by `tokens` tokens with both models in step.

    Both are fed the source's choice, so up to the first difference each sees exactly its own text. A difference counts
    only if the source prefers its token by more than `tie_margin` (in logits): below it the order is rounding, not
    the model's opinion. `progress` is called with the number of tokens that were made in step.

    Raises:
        ModelError: the logits are not finite.
    """
    size = source.signature.batch or artifact.signature.batch or len(prompts)
    first: list[int | None] = []
    ties = 0
    for start in range(0, len(prompts), size):
        group = prompts[start : start + size]
        missing = size - len(group)
        group = np.concatenate([group, np.repeat(group[-1:], missing, axis=0)])
        before = start // size * tokens
        tell = None if progress is None else lambda made, before=before: progress(before + made)
        found, tied = _group(source, artifact, group, tokens, tie_margin, size - missing, tell)
        first += found
        ties += tied
    return GreedyMatch(tokens, tuple(first), ties)


def _group(
    source: Predictor,
    artifact: Predictor,
    fed: Array,
    tokens: int,
    tie_margin: float,
    real: int,
    tell: Callable[[int], None] | None,
) -> tuple[list[int | None], int]:
    """As `greedy_match` for one batch, of which the first `real` rows count."""
    first: list[int | None] = [None] * real
    ties, rows, common = 0, np.arange(real), CommonTokens.of(source, artifact)
    mine: Any = None
    theirs: Any = None
    for step in range(tokens):
        logits, mine = source.prefill(fed, mine)
        others, theirs = artifact.prefill(fed, theirs)
        expected = logits[:, -1].astype(np.float64)
        got = others[:, -1].astype(np.float64)
        if not np.isfinite(expected).all():
            raise ModelError("the source's logits are not finite", where=source.signature.logits)
        expected = common.without_others(expected)
        choice, other = expected.argmax(axis=1), np.where(np.isfinite(got), got, -np.inf).argmax(axis=1)
        margin = expected[rows, choice[:real]] - expected[rows, other[:real]]
        differs = (choice[:real] != other[:real]) | ~np.isfinite(got[:real]).all(axis=1)
        tied = differs & (margin <= tie_margin) & np.isfinite(got[:real]).all(axis=1)
        for row in np.flatnonzero(differs & ~tied):
            if first[row] is None:
                first[row] = step
        if tell:
            tell(step + 1)
        ties += int(sum(first[row] is None for row in np.flatnonzero(tied)))
        if all(index is not None for index in first):
            break
        fed = choice[:, None].astype(np.int64)
    return first, ties
