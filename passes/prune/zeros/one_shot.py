"""Zeros chosen from the top of a matrix to its bottom, each made up for by the rows below it.

SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774). With U the upper Cholesky factor of H^-1, removing w_kn costs
(w_kn / U_kk)^2, and is best made up for by W[k+1:] -= U[k, k+1:]^T w_kn / U_kk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.passes.prune.zeros.patterns import Pattern

__all__ = ["prune_in_order"]

Array = NDArray[Any]

#: Rows whose zeros are chosen together, when the rows before them have been made up for.
_ROWS = 128


def prune_in_order(weight: Array, factor: Array, pattern: Pattern, sparsity: float) -> tuple[Array, NDArray[np.bool_]]:
    """Return the pruned weight [K, n], float32, and which weights were kept.

    Args:
        weight: W [K, n], float32; not changed.
        factor: U with H^-1 = U^T U, of `stats.curvature.inverse_factor`.
        pattern: Where zeros may lie.
        sparsity: Share of zeros in every part of the rows.
    """
    rows = len(weight)
    work = np.array(weight, np.float32)
    kept = np.empty(work.shape, bool)
    pivots = np.square(np.diagonal(factor))[:, None]
    step = _rows_together(pattern)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = slice(start, stop)
        if not pattern.group:
            kept[part] = pattern.kept(np.square(work[part]) / pivots[part], sparsity)
        errors = np.empty((stop - start, work.shape[1]), np.float32)
        for k in range(start, stop):
            if pattern.group and k % pattern.group == 0:
                near = slice(k, k + pattern.group)
                kept[near] = pattern.kept(np.square(work[near]) / pivots[near], sparsity)
            error = np.where(kept[k], 0, work[k]) / factor[k, k]
            errors[k - start] = error
            if k + 1 < stop:
                work[k + 1 : stop] -= factor[k, k + 1 : stop, None] * error
        if stop < rows:
            work[stop:] -= factor[start:stop, stop:].T @ errors
    return np.where(kept, work, 0), kept


def _rows_together(pattern: Pattern) -> int:
    """Return about `_ROWS`, a multiple of what the pattern takes together."""
    unit = pattern.group or pattern.block[0]
    return max(unit, _ROWS // unit * unit)
