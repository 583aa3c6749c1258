"""Moments of the rows that enter a matrix product, accumulated piece by piece."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Moments"]

Array = NDArray[np.float64]

#: Rows multiplied at a time: a float32 product of so few rows loses nothing that the float64 sum could keep.
_PIECE = 1024
#: The sum of the squares of a piece must stay below the largest float32.
_LARGEST = float(np.sqrt(np.finfo(np.float32).max / _PIECE))


@dataclass
class Moments:
    """Sums over the rows x of all inputs X[T, K] of a product.

    Attributes:
        size: K.
        count: T, the rows seen.
        gram: H = XᵀX [K, K], float64; None if only the sums per channel were asked for.
        total: Sum of x [K].
        absolute: Sum of |x| [K].
        square: Sum of x² [K]; the diagonal of H.
        largest: Maximum of |x| [K].
    """

    size: int
    with_gram: bool = True
    count: int = 0
    gram: Array | None = field(default=None, repr=False)
    total: Array = field(init=False, repr=False)
    absolute: Array = field(init=False, repr=False)
    square: Array = field(init=False, repr=False)
    largest: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.with_gram and self.gram is None:
            self.gram = np.zeros((self.size, self.size))
        self.total, self.absolute, self.square, self.largest = (np.zeros(self.size) for _ in range(4))

    def add(self, rows: NDArray[Any]) -> None:
        """Take in rows [..., K] of any float type.

        Raises:
            FloatingPointError: A row holds NaN, an infinite value, or one whose square is too large.
        """
        flat = np.ascontiguousarray(rows.reshape(-1, self.size), dtype=np.float32)
        for start in range(0, len(flat), _PIECE):
            piece = flat[start : start + _PIECE]
            magnitude = np.abs(piece)
            largest = magnitude.max(axis=0)
            if not np.isfinite(largest).all():
                raise FloatingPointError("NaN or infinite values")
            if largest.max() > _LARGEST:
                raise FloatingPointError(f"values of {largest.max():.1e}, whose squares overflow,")
            self.count += len(piece)
            ones = np.ones(len(piece), np.float32)
            self.total += ones @ piece
            self.absolute += ones @ magnitude
            np.maximum(self.largest, largest, out=self.largest)
            if self.gram is None:
                self.square += np.einsum("tk,tk->k", piece, piece)
            else:
                product = piece.T @ piece
                self.gram += product
                self.square += np.diagonal(product)

    @property
    def mean(self) -> Array:
        """Mean of x [K]."""
        return self.total / max(self.count, 1)

    @property
    def mean_absolute(self) -> Array:
        """Mean of |x| [K]."""
        return self.absolute / max(self.count, 1)

    @property
    def mean_square(self) -> Array:
        """Mean of x² [K]: what weighs the error of a row of a weight."""
        return self.square / max(self.count, 1)

    @property
    def variance(self) -> Array:
        """Variance of x [K]."""
        return np.maximum(self.mean_square - self.mean**2, 0.0)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return everything as arrays, for storing."""
        stored: dict[str, NDArray[Any]] = {
            "count": np.array(self.count),
            "total": self.total,
            "absolute": self.absolute,
            "square": self.square,
            "largest": self.largest,
        }
        if self.gram is not None:
            stored["gram"] = self.gram.astype(np.float32)
        return stored

    @classmethod
    def from_arrays(cls, stored: dict[str, NDArray[Any]]) -> Moments:
        """Return what `arrays` was made of."""
        gram = stored.get("gram")
        moments = cls(len(stored["total"]), with_gram=gram is not None)
        moments.count = int(stored["count"])
        moments.gram = None if gram is None else gram.astype(np.float64)
        moments.total, moments.absolute = stored["total"], stored["absolute"]
        moments.square, moments.largest = stored["square"], stored["largest"]
        return moments
