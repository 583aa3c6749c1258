"""How sparse each weight becomes, so that all together reach a wanted share of zeros."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.gradients.source import StoredFigures
from onnxslim_llm.passes.prune.zeros.scores import FIGURES, Method, scores_of
from onnxslim_llm.products.sites import WeightGroup
from onnxslim_llm.stats.statistics import StoredMoments

__all__ = ["Allocation", "Candidate", "allocate"]

Array = NDArray[Any]

Allocation = Literal["uniform", "outliers", "sensitivity"]

#: A weight is an outlier if its score |w| ||x|| is so many times the mean one (OWL's M).
_OUTLIER = 5.0
#: No weight's sparsity differs by more than this from the wanted one: OWL's lambda, and ours for costs in nats.
_SPREAD: dict[Allocation, float] = {"outliers": 0.08, "sensitivity": 0.15}
_COLUMNS = 512
#: The distribution of a weight's costs is kept as so many quantiles.
_QUANTILES = 1001


@dataclass(frozen=True)
class Candidate:
    """A weight that zeros are shared out to, and what is known about it.

    Attributes:
        group: The weight.
        method: What chooses its zeros.
        moments: Of the input of its product; None if no data reach it.
        figures: Of its gradients, where the method asks for them.
        gain: Nats that a squared error of 1 in its output costs; None where that was not measured.
    """

    group: WeightGroup
    method: Method
    moments: StoredMoments | None = None
    figures: StoredFigures | None = None
    gain: float | None = None


def allocate(allocation: Allocation, candidates: Sequence[Candidate], sparsity: float) -> list[float]:
    """Return the sparsity of each weight; their mean, by elements, is `sparsity`.

    "outliers": the larger a weight's share of outliers, the fewer zeros it gets (OWL, Yin et al. 2023, arXiv
    2310.05175). "sensitivity": the zeros go where they cost the model's answer least, by one threshold for the costs in
    nats of all weights: what the scores of methods with gradients are; of others, the squared output times the gain.

    Weights without data count as if all their inputs were alike.
    """
    if allocation == "uniform" or not 0 < sparsity < 1:
        return [sparsity] * len(candidates)
    sizes = np.array([candidate.group.source.size for candidate in candidates], np.float64)
    spread = _SPREAD[allocation]
    if allocation == "sensitivity":
        return _under_threshold([_cost_quantiles(candidate) for candidate in candidates], sizes, sparsity, spread)
    ratio = np.array([_outliers(candidate) for candidate in candidates])
    width = ratio.max() - ratio.min()
    offset = 0 * ratio if width == 0 else -2 * spread * (ratio - ratio.min()) / width
    return _with_mean(offset, sizes, sparsity, spread)


def _scores(candidate: Candidate, method: Method) -> Iterator[Array]:
    """Yield the scores of all elements, some columns at a time."""
    group, moments = candidate.group, candidate.moments
    mean_square = moments.load().fit.mean_square if moments is not None else None
    turned = group.k_axis == 1
    source = group.source.view()
    matrix = source.T if turned else source
    figures = candidate.figures.view() if candidate.figures is not None else None
    for start in range(0, group.columns, _COLUMNS):
        part = slice(start, start + _COLUMNS)
        piece = np.ascontiguousarray(matrix[:, part], dtype=np.float32)
        slopes = None if figures is None else (figures.T if turned else figures)[:, part]
        yield scores_of(method, piece, mean_square, slopes).reshape(-1)
    group.source.release()


def _outliers(candidate: Candidate) -> float:
    roots = np.sqrt(np.concatenate(list(_scores(candidate, "wanda"))))
    return float((roots > _OUTLIER * roots.mean()).mean())


def _cost_quantiles(candidate: Candidate) -> Array:
    """Return quantiles of what single zeros cost, in nats; without a gain, relative to the weight's own mean cost."""
    if candidate.method in FIGURES:
        costs = np.concatenate(list(_scores(candidate, candidate.method)))
    else:
        costs = np.concatenate(list(_scores(candidate, "wanda")))
        costs *= np.float32(1 / (costs.mean() or 1) if candidate.gain is None else candidate.gain)
    found: Array = np.quantile(costs, np.linspace(0, 1, _QUANTILES))
    return found


def _under_threshold(quantiles: Sequence[Array], sizes: Array, sparsity: float, spread: float) -> list[float]:
    """Return the share of each weight whose cost is below a common threshold, within the spread."""
    ranks = np.linspace(0, 1, _QUANTILES)
    smallest = min(float(costs[costs > 0].min(initial=np.inf)) for costs in quantiles)
    low, high = np.log(max(smallest, 1e-38)) - 1, np.log(max(float(costs[-1]) for costs in quantiles) + 1e-38) + 1

    def shares(threshold: float) -> Array:
        below = [np.interp(threshold, costs, ranks, left=0.0, right=1.0) for costs in quantiles]
        return np.clip(below, max(0.0, sparsity - spread), min(1 - 1e-6, sparsity + spread))

    for _ in range(60):
        middle = (low + high) / 2
        if shares(np.exp(middle)) @ sizes < sparsity * sizes.sum():
            low = middle
        else:
            high = middle
    return _with_mean(shares(np.exp(high)) - sparsity, sizes, sparsity, spread)


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
