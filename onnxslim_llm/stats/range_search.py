"""Which part of a histogram codes should cover: rare large values cost all others resolution."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.stats.grid import Grid, Range
from onnxslim_llm.stats.histogram import FloatHistogram

__all__ = ["entropy_range", "expected_error", "mse_range", "percentile_range"]

Array = NDArray[np.float64]

#: Points of a bucket at which the rounding error is evaluated: near the largest value a bucket is half a step wide.
_POINTS = 4
#: Clipping ranges that are tried: 2^(-i/8) of the whole, down to 1/32.
_FACTORS = 2.0 ** (-np.arange(41) / 8)
#: Coordinate steps of the search where the two ends move on their own.
_ROUNDS = 2
#: KL divergence: probability of what the codes cannot express.
_NEVER = 1e-12


def percentile_range(histogram: FloatHistogram, grid: Grid, percentile: float) -> Range:
    """Return the range that leaves out (100 - percentile) % of the values, the same number on both sides.

    For a symmetric grid it is the percentile of the magnitudes. Ends are widened to the edge of their bucket: they are
    at most 2^-8 too large.
    """
    if grid.symmetric:
        edges, counts = histogram.magnitudes()
        reached = histogram.zeros + np.cumsum(counts)
        at = int(np.searchsorted(reached, histogram.total * percentile / 100))
        high = float(edges[min(at + 1, len(edges) - 1)])
        return Range(-high, high)
    lower, upper, counts = histogram.buckets()
    left = histogram.total * (100 - percentile) / 200
    reached = np.cumsum(counts)
    low = int(np.searchsorted(reached, left, side="right"))
    high_at = int(np.searchsorted(reached, histogram.total - left))
    last = len(counts) - 1
    return Range(float(lower[min(low, last)]), float(upper[min(high_at, last)]))


def expected_error(histogram: FloatHistogram, grid: Grid, values: Range) -> float:
    """Return the mean squared error of coding the values with the scale for a range; values fill buckets evenly."""
    points, weights = _points(histogram)
    return _error(points, weights, grid, values)


def mse_range(histogram: FloatHistogram, grid: Grid, whole: Range) -> Range:
    """Return the range with the least mean squared error of rounding and clipping together.

    Args:
        histogram: The values.
        grid: The codes.
        whole: Minimum and maximum of the values.
    """
    points, weights = _points(histogram)
    best = min((Range(whole.low * f, whole.high * f) for f in _FACTORS), key=lambda r: _error(points, weights, grid, r))
    if grid.symmetric:
        return best
    for _ in range(_ROUNDS):
        lows = [Range(whole.low * f, best.high) for f in _FACTORS]
        best = min([best, *lows], key=lambda r: _error(points, weights, grid, r))
        highs = [Range(best.low, whole.high * f) for f in _FACTORS]
        best = min([best, *highs], key=lambda r: _error(points, weights, grid, r))
    return best


def entropy_range(histogram: FloatHistogram, grid: Grid, whole: Range) -> Range:
    """Return the range with the least KL divergence between the magnitudes and what the codes make of them.

    The idea of the calibrator in TensorRT (Migacz, "8-bit Inference with TensorRT", 2017): a code spreads what it
    stands for evenly over its step, and what is clipped counts as the largest magnitude.

    Args:
        histogram: The values.
        grid: The codes.
        whole: Minimum and maximum of the values.
    """
    edges, counts = histogram.magnitudes()
    if not len(counts):
        return whole
    both = grid.symmetric or (whole.low < 0 < whole.high)
    levels = grid.levels // 2 if both else grid.levels
    limits = edges[-1] * _FACTORS
    ends = sorted({max(1, int(np.searchsorted(edges, limit))) for limit in limits}, reverse=True)
    divergences = [_divergence(edges, counts, end, levels) for end in ends]
    limit = float(edges[ends[int(np.argmin(divergences))]])
    return Range(max(whole.low, -limit), min(whole.high, limit))


def _divergence(edges: Array, counts: NDArray[np.int64], end: int, levels: int) -> float:
    """KL divergence of the magnitudes below `edges[end]`, those beyond added to the last bucket."""
    kept = counts[:end].astype(np.float64)
    clipped = kept.copy()
    clipped[-1] += counts[end:].sum()
    widths, middles = np.diff(edges[: end + 1]), (edges[:end] + edges[1 : end + 1]) / 2
    codes = np.minimum((middles * (levels / edges[end])).astype(np.int64), levels - 1)
    filled = np.where(kept > 0, widths, 0.0)
    mass, room = np.bincount(codes, kept), np.bincount(codes, filled)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.where(filled > 0, mass[codes] * filled / room[codes], 0.0)
    p, q = clipped / clipped.sum(), np.maximum(spread / max(spread.sum(), _NEVER), _NEVER)
    some = p > 0
    return float(np.sum(p[some] * np.log(p[some] / q[some])))


def _points(histogram: FloatHistogram) -> tuple[Array, Array]:
    lower, upper, counts = histogram.buckets()
    steps = (np.arange(_POINTS) + 0.5) / _POINTS
    points = lower[:, None] + (upper - lower)[:, None] * steps
    return points.reshape(-1), np.repeat(counts / (_POINTS * max(histogram.total, 1)), _POINTS)


def _error(points: Array, weights: Array, grid: Grid, values: Range) -> float:
    scale, zero = grid.parameters(values)
    codes = np.clip(np.rint(points / float(scale)) + zero, grid.lowest, grid.highest)
    return float(np.sum(weights * ((codes - zero) * float(scale) - points) ** 2))
