"""The best approximation of a matrix by one of low rank, where best is said by the inputs that it is multiplied with.

With H = X^T X = L L^T, the squared error of X (M - A B) is |L^T (M - A B)|^2. The truncated singular value
decomposition of S M, S = L^T, is the best of its rank there (Eckart and Young), so A = S^-1 U_r and B = U_r^T S M. For
M a weight this is SVD-LLM (Wang et al. 2024, arXiv 2403.07378), for M the error of a quantized weight it is QERA (Zhang
et al. 2024, arXiv 2410.06040). With the roots of mean |x| as a diagonal S it is ASVD (Yuan et al. 2023, arXiv
2312.05821).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.stats.curvature import DAMPING

__all__ = ["Alike", "ByChannel", "ByGram", "LowRank", "Whitening", "low_rank", "spectrum", "whitened_by"]

Array = NDArray[Any]

_TINY = 1e-30
#: More damping, ten times as much each, is tried where H is not positive definite in spite of it.
_DAMPING_STEPS = 4


class Whitening(ABC):
    """S [K, K]: |S E|^2 is what an error E [K, N] of a weight costs."""

    @abstractmethod
    def apply(self, matrix: Array) -> Array:
        """Return S M, float64."""

    @abstractmethod
    def undo(self, matrix: Array) -> Array:
        """Return S^-1 M, float64."""


class Alike(Whitening):
    """All channels count alike: S = 1."""

    def apply(self, matrix: Array) -> Array:
        """Return M."""
        return np.asarray(matrix, np.float64)

    def undo(self, matrix: Array) -> Array:
        """Return M."""
        return np.asarray(matrix, np.float64)


@dataclass(frozen=True)
class ByChannel(Whitening):
    """S is diagonal.

    Attributes:
        scale: The diagonal [K], positive.
    """

    scale: Array = field(repr=False)

    def apply(self, matrix: Array) -> Array:
        """Return S M."""
        result: Array = np.asarray(matrix, np.float64) * self.scale[:, None]
        return result

    def undo(self, matrix: Array) -> Array:
        """Return S^-1 M."""
        result: Array = np.asarray(matrix, np.float64) / self.scale[:, None]
        return result


@dataclass(frozen=True)
class ByGram(Whitening):
    """S = L^T of H = L L^T: the squared error of the product's output.

    Attributes:
        lower: L [K, K].
    """

    lower: Array = field(repr=False)

    def apply(self, matrix: Array) -> Array:
        """Return S M."""
        result: Array = self.lower.T @ np.asarray(matrix, np.float64)
        return result

    def undo(self, matrix: Array) -> Array:
        """Return S^-1 M."""
        result: Array = np.linalg.solve(self.lower.T, matrix)
        return result


def whitened_by(gram: Array, damping: float = DAMPING) -> ByGram | None:
    """Return the whitening by H; None if H is zero or not finite.

    Args:
        gram: H [K, K].
        damping: Share of the mean of H's diagonal that is added to it.
    """
    damped = np.array(gram, np.float64)
    mean = float(np.diagonal(damped).mean())
    if not (np.isfinite(damped).all() and mean > 0):
        return None
    index = np.arange(len(damped))
    added = damping * mean
    for _ in range(_DAMPING_STEPS):
        damped[index, index] += added
        try:
            return ByGram(np.linalg.cholesky(damped))
        except np.linalg.LinAlgError:
            added *= 10
    return None


@dataclass(frozen=True)
class LowRank:
    """A B ~ M.

    Attributes:
        left: A [K, r], float32.
        right: B [r, N], float32.
        energy: Squared singular values of S M, falling; the squared error of A B is the sum of those from r on.
    """

    left: Array
    right: Array
    energy: Array


def spectrum(matrix: Array, whitening: Whitening) -> Array:
    """Return the squared singular values of S M, falling [min(K, N)], float64."""
    values = np.linalg.eigvalsh(_smaller_gram(whitening.apply(matrix)))
    result: Array = np.maximum(values[::-1], 0.0)
    return result


def low_rank(matrix: Array, whitening: Whitening, rank: int) -> LowRank:
    """Return the approximation of rank `rank` with the least |S (M - A B)|^2.

    Args:
        matrix: M [K, N].
        whitening: S.
        rank: From 1 to min(K, N).
    """
    white = whitening.apply(matrix)
    values, vectors = np.linalg.eigh(_smaller_gram(white))
    order = np.argsort(values)[::-1]
    chosen = vectors[:, order[:rank]]
    if white.shape[0] <= white.shape[1]:
        left, right = chosen, chosen.T @ white
    else:
        left, right = white @ chosen, chosen.T
    left = whitening.undo(left)
    # Both factors get the same size in each direction, which suits their quantization.
    sizes = [np.maximum(np.linalg.norm(part, axis=axis), _TINY) for part, axis in ((right, 1), (left, 0))]
    balance = np.sqrt(sizes[0] / sizes[1])
    energy = np.maximum(values[order], 0.0)
    return LowRank((left * balance).astype(np.float32), (right / balance[:, None]).astype(np.float32), energy)


def _smaller_gram(matrix: Array) -> Array:
    """Return M M^T or M^T M, whichever is smaller: both have the squared singular values as eigenvalues."""
    result: Array = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return result
