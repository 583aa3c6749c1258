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

__all__ = ["Coded", "Grid", "compensate", "inverse_factor", "output_error"]

Array = NDArray[Any]

#: Share of the mean of H's diagonal that is added to it: H of few tokens is not of full rank.
DAMPING = 0.01
#: More of it is tried where H is not positive definite in spite of that.
_DAMPING_STEPS = 4


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


def inverse_factor(gram: Array) -> Array | None:
    """Return the upper triangular U with H^-1 = U^T U, float32 [K, K]; None if H cannot be made positive definite.

    Channels that never fire get the diagonal 1: their weights do not matter to the data, and are rounded as they are.

    Args:
        gram: H [K, K].
    """
    h = np.array(gram, np.float64)
    diagonal = np.diagonal(h).copy()
    dead = diagonal <= 0
    if dead.all() or not np.isfinite(diagonal).all():
        return None
    h[dead, dead] = diagonal.mean()
    damping = DAMPING * float(diagonal.mean())
    index = np.arange(len(h))
    for _ in range(_DAMPING_STEPS):
        h[index, index] += damping
        try:
            lower = np.linalg.cholesky(h)
            # H = L L^T, so with the rows and columns of H reversed its factor gives the upper factor of the inverse.
            inverse = np.linalg.inv(lower)
            upper = np.linalg.cholesky(inverse.T @ inverse).T
        except np.linalg.LinAlgError:
            damping *= 10
            continue
        return np.ascontiguousarray(upper, dtype=np.float32)
    return None


def compensate(weight: Array, factor: Array, block: int, levels: int, fit: Callable[[Array, int], Grid]) -> Coded:
    """Return codes for W[K, n].

    Args:
        weight: W, float32; not changed.
        factor: What `inverse_factor` returned.
        block: Rows that share a scale.
        levels: Largest code.
        fit: Chooses the grid of a block from its rows, as the errors before it have changed them, and its first row.
    """
    rows, columns = weight.shape
    work = np.array(weight, np.float32)
    codes = np.empty((rows, columns), np.uint8)
    grids = []
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        grid = fit(work[start:stop], start)
        grids.append(grid)
        scale, zero = grid.scales.astype(np.float32), grid.zeros.astype(np.float32)
        inverse = np.where(scale == 0, 0, 1 / np.where(scale == 0, 1, scale)).astype(np.float32)
        errors = np.empty((stop - start, columns), np.float32)
        for k in range(start, stop):
            row = work[k]
            code = np.clip(np.rint(row * inverse) + zero, 0, levels)
            codes[k] = code
            error = (row - (code - zero) * scale) / factor[k, k]
            errors[k - start] = error
            if k + 1 < stop:
                work[k + 1 : stop] -= factor[k, k + 1 : stop, None] * error
        if stop < rows:
            work[stop:] -= factor[start:stop, stop:].T @ errors
    return Coded(codes, np.stack([g.scales for g in grids]), np.stack([g.zeros for g in grids]))


def output_error(error: Array, gram: Array) -> Array:
    """Return the squared error that a change E of a weight makes in each output, summed over the rows of X.

    Args:
        error: E [K, n].
        gram: H = X^T X [K, K].

    Returns:
        The diagonal of E^T H E [n], float64.
    """
    result: Array = np.einsum("kn,kn->n", gram.astype(np.float32) @ error, error, dtype=np.float64)
    return result
