"""Codes chosen one row after the other, each making up for the errors of those before it.

GPTQ (Frantar et al. 2022, arXiv 2210.17323). With U the upper Cholesky factor of H^-1, the error e = (w_k - q_k) / U_kk
of row k of a weight W[K, N] is best taken back by W[k+1:] -= U[k, k+1:]^T e. Columns are independent of each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["RUN", "Coded", "Grid", "compensate"]

Array = NDArray[Any]

#: Rows whose errors are taken back from each other one by one; what is behind them follows in one matrix product.
RUN = 16


@dataclass(frozen=True)
class Grid:
    """What the rows of a block are rounded to: scale * (code - zero).

    Attributes:
        scales: [n] float32, as stored.
        zeros: [n] integers.
    """

    scales: Array
    zeros: Array


@dataclass(frozen=True)
class Coded:
    """A coded weight: W ~ scales * (codes - zeros).

    Attributes:
        codes: [K, n] uint8.
        scales: [KB, n], one row a block.
        zeros: [KB, n] uint8.
    """

    codes: Array
    scales: Array
    zeros: Array

    def dequantized(self, block: int) -> Array:
        """Return the weight that the codes stand for, [K, n] float32."""
        rows = len(self.codes)
        scale = np.repeat(self.scales.astype(np.float32), block, axis=0)[:rows]
        zero = np.repeat(self.zeros.astype(np.float32), block, axis=0)[:rows]
        result: Array = (self.codes.astype(np.float32) - zero) * scale
        return result


def compensate(weight: Array, factor: Array, block: int, levels: int, fit: Callable[[Array, int], Grid]) -> Coded:
    """Return codes for W[K, n]. What is exactly zero stays zero: pruned weights stay pruned.

    Args:
        weight: W, float32; not changed.
        factor: What `inverse_factor` returned.
        block: Rows that share a scale.
        levels: Largest code.
        fit: Chooses the grid of a block from its rows, as the errors before it have changed them, and its first row.
    """
    rows, columns = weight.shape
    work = np.array(weight, np.float32)
    kept = weight != 0
    codes = np.empty((rows, columns), np.uint8)
    grids = []
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        grid = fit(np.where(kept[start:stop], work[start:stop], 0), start)
        grids.append(grid)
        scale, zero = grid.scales.astype(np.float32), grid.zeros.astype(np.float32)
        inverse = np.where(scale == 0, 0, 1 / np.where(scale == 0, 1, scale)).astype(np.float32)
        errors = np.empty((stop - start, columns), np.float32)
        for first in range(start, stop, RUN):
            last = min(first + RUN, stop)
            for k in range(first, last):
                row = work[k]
                code = np.where(kept[k], np.clip(np.rint(row * inverse) + zero, 0, levels), zero)
                codes[k] = code
                error = (row - (code - zero) * scale) / factor[k, k]
                errors[k - start] = error
                work[k + 1 : last] -= factor[k, k + 1 : last, None] * error
            work[last:stop] -= factor[first:last, last:stop].T @ errors[first - start : last - start]
        if stop < rows:
            work[stop:] -= factor[start:stop, stop:].T @ errors
    return Coded(codes, np.stack([g.scales for g in grids]), np.stack([g.zeros for g in grids]))
