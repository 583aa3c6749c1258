"""How often values occur, in buckets as wide as a float's last kept bits: bounded memory, any range, any order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FloatHistogram"]

Counts = NDArray[np.int64]

#: Buckets of an octave: the upper bits of the float32 mantissa.
_MANTISSA_BITS = 8
_SHIFT = 23 - _MANTISSA_BITS
#: Octaves below the largest magnitude that are told from zero: 16 bits of codes end 16 octaves below it.
_OCTAVES = 20
_LENGTH = _OCTAVES << _MANTISSA_BITS
_SIGN = np.uint32(1 << 31)
#: Values looked at in one go.
_PIECE = 1 << 20


@dataclass
class FloatHistogram:
    """Counts of values by sign and leading bits, each bucket 2^-8 to 2^-9 of its own values wide.

    The result does not depend on the order or the pieces in which values come, and takes 80 KiB: there is no range to
    guess and nothing to scale again when a larger value comes.

    Attributes:
        zeros: How many values were zero, or less than 2^-20 of the largest.
    """

    zeros: int = 0
    _top: int = -1  # bucket of the largest magnitude, -1 before the first one
    _counts: Counts = field(default_factory=lambda: np.zeros((2, _LENGTH), np.int64), repr=False)

    def add(self, values: NDArray[np.float32]) -> None:
        """Count finite values of any shape."""
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        for start in range(0, len(flat), _PIECE):
            self._add(flat[start : start + _PIECE].view(np.uint32))

    def _add(self, bits: NDArray[np.uint32]) -> None:
        buckets = ((bits & ~_SIGN) >> np.uint32(_SHIFT)).astype(np.int32)
        self._raise_top(int(buckets.max()))
        places = buckets - (self._top - _LENGTH + 1)
        seen = (places >= 0) & (buckets > 0)
        self.zeros += len(bits) - int(np.count_nonzero(seen))
        signs = (bits[seen] >> np.uint32(31)).astype(np.int32)
        both = np.bincount(signs * _LENGTH + places[seen], minlength=2 * _LENGTH)
        self._counts += both.reshape(2, _LENGTH)

    def _raise_top(self, top: int) -> None:
        steps = top - self._top
        if steps <= 0:
            return
        self._top = top
        lost = min(steps, _LENGTH)
        self.zeros += int(self._counts[:, :lost].sum())
        self._counts = np.concatenate([self._counts[:, lost:], np.zeros((2, lost), np.int64)], axis=1)

    @property
    def total(self) -> int:
        """How many values were counted."""
        return self.zeros + int(self._counts.sum())

    def buckets(self) -> tuple[NDArray[Any], NDArray[Any], Counts]:
        """Return the buckets that hold values, ascending: lower edges, upper edges, counts.

        Zeros are one bucket without width.
        """
        edges = _edges(self._top)
        lower, upper = edges[:-1], edges[1:]
        low = np.concatenate([-upper[::-1], [0.0], lower])
        high = np.concatenate([-lower[::-1], [0.0], upper])
        counts = np.concatenate([self._counts[1, ::-1], [self.zeros], self._counts[0]])
        held = counts > 0
        return low[held], high[held], counts[held]

    def magnitudes(self) -> tuple[NDArray[Any], Counts]:
        """Return the counts by magnitude, zeros left out: edges [n + 1] and counts [n], empty buckets included."""
        counts = self._counts.sum(axis=0)
        held = np.flatnonzero(counts)
        if not len(held):
            return np.zeros(1), np.zeros(0, np.int64)
        part = slice(int(held[0]), int(held[-1]) + 1)
        return _edges(self._top)[part.start : part.stop + 1], counts[part]


def _edges(top: int) -> NDArray[Any]:
    """Return the edges of all buckets up to `top`, float64."""
    numbers = np.arange(top - _LENGTH + 1, top + 2)
    bits = np.clip(numbers, 0, None).astype(np.uint32) << np.uint32(_SHIFT)
    edges: NDArray[Any] = bits.view(np.float32).astype(np.float64)
    if not np.isfinite(edges[-1]):  # the bucket of the largest floats ends where infinity begins
        edges[-1] = 2.0**128
    return edges
