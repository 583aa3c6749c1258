"""Calibrators: each sees a tensor's values sample by sample and says at the end which range codes should cover.

None of them keeps values, so that the memory they take does not depend on the number of samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.stats.grid import Grid, Range
from onnxslim_llm.stats.histogram import FloatHistogram
from onnxslim_llm.stats.range_search import entropy_range, expected_error, mse_range, percentile_range

__all__ = ["CALIBRATORS", "CalibratorName", "RangeCollector", "make_collector"]

CalibratorName = Literal["minmax", "percentile", "entropy", "mse", "moving_average"]
CALIBRATORS: tuple[CalibratorName, ...] = get_args(CalibratorName)

#: What the last sample counts in a moving average.
_LATEST = 0.1


@dataclass
class RangeCollector(ABC):
    """What is known about one tensor, or about several that share a scale.

    Attributes:
        low: Smallest value seen.
        high: Largest value seen.
        count: How many values were seen.
        square: Sum of their squares.
    """

    low: float = np.inf
    high: float = -np.inf
    count: int = 0
    square: float = 0.0

    def add(self, values: NDArray[Any]) -> None:
        """Take in the values of one sample, of any float type and shape.

        Raises:
            FloatingPointError: One is NaN or infinite.
        """
        if not values.size:
            return
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        low, high = float(flat.min()), float(flat.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise FloatingPointError("NaN values" if np.isnan(low) or np.isnan(high) else "infinite values")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.count += flat.size
        self.square += float(np.einsum("i,i->", flat, flat, dtype=np.float64))
        self._add(flat, low, high)

    @property
    def whole(self) -> Range:
        """From the smallest to the largest value."""
        return Range(self.low, self.high) if self.count else Range(0.0, 0.0)

    @property
    def mean_square(self) -> float:
        """Mean of the squares."""
        return self.square / max(self.count, 1)

    def error(self, grid: Grid, values: Range) -> float:
        """Return the mean squared error of coding the values, taken as a step's rounding."""
        scale, _ = grid.parameters(values)
        return float(scale) ** 2 / 12

    @abstractmethod
    def range(self, grid: Grid) -> Range:
        """Return the range that the codes of `grid` should cover."""

    def _add(self, flat: NDArray[np.float32], low: float, high: float) -> None:  # noqa: B027 (nothing more to know)
        """Take in finite values, whose extremes are known."""


class MinMax(RangeCollector):
    """Everything that was seen: nothing is clipped."""

    def range(self, grid: Grid) -> Range:
        """Return the range from the smallest to the largest value."""
        return self.whole


@dataclass
class HistogramCollector(RangeCollector):
    """A calibrator that decides by how often values occur."""

    histogram: FloatHistogram = field(default_factory=FloatHistogram, repr=False)

    def _add(self, flat: NDArray[np.float32], low: float, high: float) -> None:
        self.histogram.add(flat)

    def error(self, grid: Grid, values: Range) -> float:
        """Return the mean squared error of coding the values, clipping included."""
        return expected_error(self.histogram, grid, values)


@dataclass
class MovingAverage(HistogramCollector):
    """Exponential moving averages of each sample's extremes: single outliers among many samples fade."""

    average: Range | None = None

    def _add(self, flat: NDArray[np.float32], low: float, high: float) -> None:
        super()._add(flat, low, high)
        old = self.average or Range(low, high)
        self.average = Range(old.low + _LATEST * (low - old.low), old.high + _LATEST * (high - old.high))

    def range(self, grid: Grid) -> Range:
        """Return the averages."""
        return self.average or self.whole


@dataclass
class Percentile(HistogramCollector):
    """All but the rarest values.

    Attributes:
        percentile: Percentage of values that are not clipped.
    """

    percentile: float = 99.99

    def range(self, grid: Grid) -> Range:
        """Return the range without the outermost values."""
        found = percentile_range(self.histogram, grid, self.percentile) if self.count else self.whole
        # A tensor that is almost always zero still has to express what it sometimes is.
        return found if not found.problem else self.whole


class Entropy(HistogramCollector):
    """The range that keeps most of the distribution's information."""

    def range(self, grid: Grid) -> Range:
        """Return the range of least KL divergence."""
        return entropy_range(self.histogram, grid, self.whole) if self.count else self.whole


class LeastSquares(HistogramCollector):
    """The range with the least squared error."""

    def range(self, grid: Grid) -> Range:
        """Return the range of least squared error."""
        return self.whole if self.whole.problem else mse_range(self.histogram, grid, self.whole)


def make_collector(calibrator: CalibratorName, percentile: float = 99.99) -> RangeCollector:
    """Return a new collector.

    Args:
        calibrator: Which kind.
        percentile: For "percentile": percentage of values that are not clipped.
    """
    if calibrator == "percentile":
        return Percentile(percentile=percentile)
    kinds: dict[CalibratorName, type[RangeCollector]] = {
        "minmax": MinMax,
        "moving_average": MovingAverage,
        "entropy": Entropy,
        "mse": LeastSquares,
    }
    return kinds[calibrator]()
