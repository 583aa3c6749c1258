"""Tables of 16 values that suit a distribution of weights, whatever the model; the largest value is 1."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["FIXED_BOOKS", "FixedBook", "fixed_book"]

Array = NDArray[Any]
FixedBook = Literal["nf4", "fp4", "log2"]

FIXED_BOOKS: tuple[FixedBook, ...] = ("nf4", "fp4", "log2")
#: Quantile at which the normal table ends, by the shares of one code in 16 and one in 15 (QLoRA, arXiv 2305.14314).
_NORMAL_END = 1 - (1 / 32 + 1 / 30) / 2


def fixed_book(kind: FixedBook) -> Array:
    """Return a table [16], float32, in rising order, zero among its values.

    Args:
        kind: "nf4" has quantiles of the normal distribution, with which all codes are about as frequent in a block of
            normal weights; "fp4" the values of a float of 4 bits (E2M1); "log2" powers of two, 2^-7 to 1, and -2^-6 to
            -1: products become shifts.
    """
    if kind == "nf4":
        above = _normal_quantiles(8)
        below = _normal_quantiles(7)
    elif kind == "fp4":
        magnitudes = np.array([0.5, 1, 1.5, 2, 3, 4, 6]) / 6
        # Both zeros of the format are one value: the place that is left goes to a magnitude between the two largest.
        above, below = np.sort(np.append(magnitudes, 5 / 6)), magnitudes
    else:
        above, below = 2.0 ** np.arange(-7, 1), 2.0 ** np.arange(-6, 1)
    return np.concatenate([-below[::-1], [0.0], above]).astype(np.float32)


def _normal_quantiles(count: int) -> Array:
    """Return `count` positive quantiles, evenly spaced in probability, the last one scaled to 1."""
    normal = NormalDist()
    places = np.linspace(0.5, _NORMAL_END, count + 1)[1:]
    values = np.array([normal.inv_cdf(p) for p in places])
    result: Array = values / values[-1]
    return result
