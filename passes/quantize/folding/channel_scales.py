"""The search for factors by channel that let few-bit weights lose less.

AWQ (Lin et al. 2023, arXiv 2306.00978): s_j = mean|x_j|^a, or with the size of the weights mean|x_j|^a / |w_j|^(1 - a),
the exponent a from a grid. The error of a candidate is tr(E^T H E) with E = W - diag(1 / s) Q(diag(s) W).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.concepts.block_weights import WeightScheme
from onnxslim_llm.passes.quantize.codes.trial import lost, quickly_coded
from onnxslim_llm.stats.moments import Moments

__all__ = ["Candidate", "Columns", "best_candidate", "candidates"]

Array = NDArray[Any]

#: Factors are kept within so many octaves around 1 in each direction: more would leave float16.
_OCTAVES = 10.0
#: What never fires counts as much as this share of the mean.
_FLOOR = 1e-4


@dataclass(frozen=True)
class Columns:
    """Some columns of a weight, and how it will be quantized.

    Attributes:
        rows: The columns as rows [n, K], float32.
        scheme: How.
        total: N, of which these are some.
    """

    rows: Array
    scheme: WeightScheme
    total: int

    @property
    def times(self) -> float:
        """How many columns each of these stands for."""
        return self.total / len(self.rows)


@dataclass(frozen=True)
class Candidate:
    """Factors to try.

    Attributes:
        exponent: a.
        by_weight: Whether the size of the weights counts, too.
        factor: s [K], float64.
    """

    exponent: float
    by_weight: bool
    factor: Array


def candidates(
    size: Array, weights: Sequence[Array], grid: int, tie: Callable[[Array], Array], *, always_by_weight: bool = False
) -> Iterator[Candidate]:
    """Yield the factors of a grid.

    Args:
        size: [K], how large the channels of the input are.
        weights: Columns [n, K] of all products.
        grid: Steps of the exponent between 0 and 1.
        tie: Makes factors equal that must be.
        always_by_weight: Leave away the candidates that the weights do not count in.
    """
    x = _relative(size)
    w = _relative(np.sqrt(sum(np.square(m, dtype=np.float64).sum(axis=0) for m in weights)))
    for step in range(grid + 1):
        exponent = step / grid
        for by_weight in (True,) if always_by_weight else (False, True):
            if step == 0 and not by_weight:
                continue  # all ones
            logarithm = exponent * np.log2(x) - by_weight * (1 - exponent) * np.log2(w)
            logarithm -= (logarithm.max() + logarithm.min()) / 2
            factor = tie(np.exp2(np.clip(logarithm, -_OCTAVES, _OCTAVES)))
            yield Candidate(exponent, by_weight, factor)


def best_candidate(
    columns: Sequence[Columns], moments: Moments, choices: Iterator[Candidate]
) -> tuple[Candidate | None, float, float]:
    """Return the candidate with the least error on the samples that scales are fitted to, its error and that without.

    Args:
        columns: Of all products of the input.
        moments: Of the input, with H.
        choices: What to try.
    """
    assert moments.gram is not None
    gram = moments.gram.astype(np.float32)
    plain = _error(columns, moments, gram, np.ones(moments.size))
    best: Candidate | None = None
    least = plain
    for choice in choices:
        error = _error(columns, moments, gram, choice.factor)
        if error < least:
            best, least = choice, error
    return best, least, plain


def _relative(size: Array) -> Array:
    mean = float(size.mean())
    return np.maximum(size / mean, _FLOOR) if mean > 0 else np.ones(len(size))


def _error(columns: Sequence[Columns], moments: Moments, gram: Array, factor: Array) -> float:
    importance = moments.mean_square / factor**2
    up, down = factor.astype(np.float32), (1 / factor).astype(np.float32)
    total = 0.0
    for part in columns:
        total += part.times * lost(part.rows - quickly_coded(part.rows * up, part.scheme, importance) * down, gram)
    return total
