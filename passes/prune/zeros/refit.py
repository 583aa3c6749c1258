"""The least-squares weights for a given pattern of zeros, all columns at once.

For each column the best values of the kept weights solve H_SS v = H_S: w, with another S for every column. Instead of
one factorization a column, conjugate gradients in the subspaces: an iteration is one product with H for all columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.stats.curvature import DAMPING

__all__ = ["refit"]

Array = NDArray[Any]

#: Iterations at most. What is left then is far below what the damping changes.
_ITERATIONS = 60
#: Columns whose residual has fallen to this share of its start are done.
_ENOUGH = 1e-5


def refit(weight: Array, pruned: Array, kept: NDArray[np.bool_], gram: Array) -> Array:
    """Return V with zeros where nothing is kept that minimises ||X (W - V)||^2 + damping ||W - V||^2, column by column.

    Args:
        weight: W [K, n], what the product should compute.
        pruned: Where to begin: zero outside of `kept`.
        kept: [K, n].
        gram: H = X^T X [K, K], float32; as everywhere 1 % of its mean diagonal is added.

    Returns:
        V [K, n], float32.
    """
    diagonal = np.diagonal(gram).astype(np.float32)
    damping = np.float32(DAMPING * float(diagonal.mean()) or 1.0)
    scale = (1 / (diagonal + damping))[:, None]

    def curve(direction: Array) -> Array:
        product: Array = gram @ direction + damping * direction
        return product

    v = np.array(pruned, np.float32)
    residual = np.where(kept, curve(weight - v), 0)
    step = residual * scale
    length = np.einsum("kn,kn->n", residual, step)
    goal = length * _ENOUGH**2
    for _ in range(_ITERATIONS):
        active = length > goal
        if not active.any():
            break
        bent = np.where(kept, curve(step), 0)
        slope = np.einsum("kn,kn->n", step, bent)
        go = np.where(active & (slope > 0), length / np.where(slope > 0, slope, 1), 0).astype(np.float32)
        v += go * step
        residual -= go * bent
        scaled = residual * scale
        new = np.einsum("kn,kn->n", residual, scaled)
        step = scaled + (np.where(length > 0, new / np.where(length > 0, length, 1), 0)).astype(np.float32) * step
        length = new
    return v
