"""How sparse each weight becomes, so that all together reach a wanted share of zeros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.passes.prune.scores import scores_of
from onnxslim_llm.products.sites import WeightGroup
from onnxslim_llm.stats.statistics import StoredMoments

__all__ = ["Allocation", "allocate"]

Array = NDArray[Any]

Allocation = Literal["uniform", "outliers", "error"]

#: A weight is an outlier if its score |w| ||x|| is so many times the mean one (OWL's M).
_OUTLIER = 5.0
#: No weight's sparsity differs by more than this from the wanted one (OWL's lambda).
_SPREAD = 0.08
#: "error" may go further: it knows what it costs.
_SPREAD_BY_ERROR = 0.2
#: Points of the curve of error over sparsity that is kept for each weight.
_POINTS = 256
_COLUMNS = 512


def allocate(
    allocation: Allocation, weights: Sequence[tuple[WeightGroup, StoredMoments | None]], sparsity: float
) -> list[float]:
    """Return the sparsity of each weight; their mean, by elements, is `sparsity`.

    Weights without data count as if all their inputs were alike.
    """
    if allocation == "uniform" or not 0 < sparsity < 1:
        return [sparsity] * len(weights)
    sizes = np.array([group.source.size for group, _ in weights], np.float64)
    if allocation == "outliers":
        ratio = np.array([_outliers(group, moments) for group, moments in weights])
        spread = ratio.max() - ratio.min()
        offset = 0 * ratio if spread == 0 else -2 * _SPREAD * (ratio - ratio.min()) / spread
        return _with_mean(offset, sizes, sparsity, _SPREAD)
    return _by_error([_curve(group, moments) for group, moments in weights], sizes, sparsity)


def _pieces(group: WeightGroup, moments: StoredMoments | None) -> list[Array]:
    """Return the scores of all weights, some columns at a time."""
    mean_square = moments.load().fit.mean_square if moments is not None else None
    source = group.source.view()
    matrix = source if group.k_axis == 0 else source.T
    pieces = []
    for start in range(0, group.columns, _COLUMNS):
        piece = np.ascontiguousarray(matrix[:, start : start + _COLUMNS], dtype=np.float32)
        pieces.append(scores_of(piece, mean_square).reshape(-1))
    group.source.release()
    return pieces


def _outliers(group: WeightGroup, moments: StoredMoments | None) -> float:
    roots = np.sqrt(np.concatenate(_pieces(group, moments)))
    return float((roots > _OUTLIER * roots.mean()).mean())


def _curve(group: WeightGroup, moments: StoredMoments | None) -> Array:
    """Return the share of the output that is lost with the smallest 1/P, 2/P, ... of the weights [P]."""
    scores = np.sort(np.concatenate(_pieces(group, moments)))
    lost = np.cumsum(scores, dtype=np.float64)
    at = (np.arange(1, _POINTS + 1) * scores.size // _POINTS) - 1
    result: Array = lost[at] / max(float(lost[-1]), np.finfo(np.float64).tiny)
    return result


def _by_error(curves: list[Array], sizes: Array, sparsity: float) -> list[float]:
    """Return sparsities at which one more zero costs the same share of its product's output everywhere.

    The sum of the lost shares is least where the slopes of all curves, per element, are equal: one multiplier, found by
    bisection.
    """
    low, high = max(0.0, sparsity - _SPREAD_BY_ERROR), min(1.0, sparsity + _SPREAD_BY_ERROR)
    slopes = [np.diff(curve, prepend=0.0) * _POINTS / size for curve, size in zip(curves, sizes, strict=True)]

    def shares(price: float) -> Array:
        taken = [np.searchsorted(np.maximum.accumulate(slope), price) / _POINTS for slope in slopes]
        return np.clip(np.array(taken), low, high)

    below, above = 0.0, max(float(slope.max()) for slope in slopes)
    for _ in range(60):
        price = (below + above) / 2
        if shares(price) @ sizes < sparsity * sizes.sum():
            below = price
        else:
            above = price
    return _with_mean(shares(above) - sparsity, sizes, sparsity, _SPREAD_BY_ERROR)


def _with_mean(offset: Array, sizes: Array, sparsity: float, spread: float) -> list[float]:
    """Return sparsity + offset, shifted so that the mean by elements is `sparsity`, within the spread."""
    low, high = max(0.0, sparsity - spread), min(1 - 1e-6, sparsity + spread)
    below, above = -1.0, 1.0
    for _ in range(60):
        shift = (below + above) / 2
        if np.clip(sparsity + offset + shift, low, high) @ sizes < sparsity * sizes.sum():
            below = shift
        else:
            above = shift
    return [float(share) for share in np.clip(sparsity + offset + above, low, high)]
