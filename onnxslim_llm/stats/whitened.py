"""The best approximation of a matrix by one of low rank, where best is said by the inputs that it is multiplied with.

With H = X^T X = L L^T, the squared error of X (M - A B) is |L^T (M - A B)|^2. The truncated singular value
decomposition of L^T M is the best of its rank there (Eckart and Young), so A = L^-T U_r and B = U_r^T L^T M. For M a
weight this is SVD-LLM (Wang et al. 2024, arXiv 2403.07378), for M the error of a quantized weight it is QERA (Zhang et
al. 2024, arXiv 2410.06040).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.stats.curvature import DAMPING

__all__ = ["LowRank", "low_rank"]

Array = NDArray[Any]

_TINY = 1e-30


@dataclass(frozen=True)
class LowRank:
    """A B ~ M.

    Attributes:
        left: A [K, r], float32.
        right: B [r, N], float32.
        energy: Squared singular values of L^T M, falling; their sum is the squared output.
    """

    left: Array
    right: Array
    energy: Array


def low_rank(matrix: Array, gram: Array | None, rank: int) -> LowRank | None:
    """Return the best approximation of rank `rank`; None if H is not positive definite, even damped.

    Args:
        matrix: M [K, N].
        gram: H [K, K]; None weighs all channels alike.
        rank: At most min(K, N).
    """
    wide = np.asarray(matrix, np.float64)
    size = len(wide)
    lower: Array
    if gram is None:
        lower = np.eye(size)
    else:
        damped = np.array(gram, np.float64)
        damped[np.arange(size), np.arange(size)] += DAMPING * float(np.diagonal(gram).mean())
        try:
            lower = np.linalg.cholesky(damped)
        except np.linalg.LinAlgError:
            return None
    whitened = lower.T @ wide
    # The eigenvectors of M M^T are the left singular vectors; K is what matrices of H are as large as anyway.
    values, vectors = np.linalg.eigh(whitened @ whitened.T)
    order = np.argsort(values)[::-1]
    energy = np.maximum(values[order], 0.0)
    left = vectors[:, order[:rank]]
    right = left.T @ whitened
    left = np.linalg.solve(lower.T, left)
    # Both factors get the same size in each direction, which suits their quantization.
    sizes = [np.maximum(np.linalg.norm(part, axis=axis), _TINY) for part, axis in ((right, 1), (left, 0))]
    balance = np.sqrt(sizes[0] / sizes[1])
    return LowRank((left * balance).astype(np.float32), (right / balance[:, None]).astype(np.float32), energy)
