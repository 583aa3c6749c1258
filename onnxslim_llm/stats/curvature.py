"""What H = X^T X says about changes of a weight: what they cost, and which ones make up for others."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DAMPING", "inverse_factor", "output_error"]

Array = NDArray[Any]

#: Share of the mean of H's diagonal that is added to it: H of few tokens is not of full rank.
DAMPING = 0.01
#: More of it is tried where H is not positive definite in spite of that.
_DAMPING_STEPS = 4


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
