"""The codes that a range of values is mapped to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = ["Grid", "Range", "grid_of"]

IntegerType = Literal["uint4", "int4", "uint8", "int8", "uint16", "int16"]


@dataclass(frozen=True)
class Range:
    """What a tensor's values are taken to lie in; those outside are clipped."""

    low: float
    high: float

    def union(self, other: Range) -> Range:
        """Return the smallest range that covers both."""
        return Range(min(self.low, other.low), max(self.high, other.high))

    @property
    def problem(self) -> str:
        """Why no scale can be made of it, or nothing."""
        if not (np.isfinite(self.low) and np.isfinite(self.high)):
            return "its range is not finite"
        if max(abs(self.low), abs(self.high)) < float(np.finfo(np.float32).tiny):
            return "its range is zero"
        if self.high - self.low > float(np.finfo(np.float32).max):
            return "its range is wider than float32 can express"
        return ""


@dataclass(frozen=True)
class Grid:
    """Integer codes from `lowest` to `highest`; value = (code - zero point) * scale.

    Attributes:
        symmetric: The zero point is the middle of the codes, whatever the range.
    """

    lowest: int
    highest: int
    symmetric: bool

    @property
    def levels(self) -> int:
        """Number of steps between the lowest and the highest code."""
        return self.highest - self.lowest

    def parameters(self, values: Range) -> tuple[np.float32, int]:
        """Return scale and zero point for a range, which is widened to hold 0: padding and masks must stay exact.

        Raises:
            ValueError: The range is zero or not finite.
        """
        if values.problem:
            raise ValueError(values.problem)
        low, high = min(values.low, 0.0), max(values.high, 0.0)
        if self.symmetric:
            scale = np.float32(max(-low, high) / (self.levels // 2))
            return _positive(scale), (self.lowest + self.highest + 1) // 2
        scale = _positive(np.float32((high - low) / self.levels))
        zero = round(self.lowest - low / float(scale))
        return scale, min(max(zero, self.lowest), self.highest)


def grid_of(kind: IntegerType, symmetric: bool) -> Grid:
    """Return the codes of an integer type."""
    bits = int(kind.lstrip("uint"))
    lowest = 0 if kind.startswith("u") else -(1 << bits - 1)
    return Grid(lowest, lowest + (1 << bits) - 1, symmetric)


def _positive(scale: np.float32) -> np.float32:
    """Runtimes divide by the scale: it must not be zero or subnormal."""
    return max(scale, np.finfo(np.float32).tiny)
