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

Allocation = Literal["uniform", "outliers"]

#: A weight is an outlier if its score |w| ||x|| is so many times the mean one (OWL's M).
_OUTLIER = 5.0
#: No weight's sparsity differs by more than this from the wanted one (OWL's lambda).
_SPREAD = 0.08
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
    ratio = np.array([_outliers(group, moments) for group, moments in weights])
    spread = ratio.max() - ratio.min()
    offset = 0 * ratio if spread == 0 else -2 * _SPREAD * (ratio - ratio.min()) / spread
    return _with_mean(offset, sizes, sparsity)


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


def _with_mean(offset: Array, sizes: Array, sparsity: float) -> list[float]:
    """Return sparsity + offset, shifted so that the mean by elements is `sparsity`, within the spread."""
    low, high = max(0.0, sparsity - _SPREAD), min(1 - 1e-6, sparsity + _SPREAD)
    below, above = -1.0, 1.0
    for _ in range(60):
        shift = (below + above) / 2
        if np.clip(sparsity + offset + shift, low, high) @ sizes < sparsity * sizes.sum():
            below = shift
        else:
            above = shift
    return [float(share) for share in np.clip(sparsity + offset + above, low, high)]
