"""Rotations of channels that spread outliers over all of them, and what they do to statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.passes.quantize.rotation.hadamard import factors
from onnxslim_llm.stats.moments import Moments
from onnxslim_llm.stats.transforms import Transform

__all__ = ["Rotated", "Rotation"]

Array = NDArray[Any]

#: Mean of |x| over the root of the mean of x², for a normal distribution.
_NORMAL = math.sqrt(2 / math.pi)


@dataclass(frozen=True)
class Rotation:
    """The orthogonal matrix R = diag(signs) H / sqrt(n): a Hadamard matrix with random signs (QuIP#, QuaRot).

    Where no Hadamard matrix of the order is known, the odd part of n gets a random orthogonal factor instead.

    Attributes:
        size: n. Vectors whose length is a multiple of n are rotated piece by piece.
        seed: Of the signs.
    """

    size: int
    seed: int

    @property
    def digest(self) -> str:
        """Identifies the matrix."""
        return f"hadamard v1 {self.size} seed {self.seed}"

    @cached_property
    def is_hadamard(self) -> bool:
        """Whether all entries of R have the same magnitude."""
        return factors(self.size) is not None

    def apply(self, rows: Array) -> Array:
        """Return v R for the vectors v along the last axis, in the float type that they have."""
        shape = rows.shape
        if shape[-1] % self.size:
            raise ValueError(f"vectors of {shape[-1]} elements cannot be rotated in pieces of {self.size}")
        signs, matrices = self._parts
        kind = np.promote_types(rows.dtype, np.float32)
        work = rows.reshape(-1, self.size).astype(kind) * signs.astype(kind)
        # A product with a Kronecker product is one with each factor, along an axis of its own.
        for matrix in matrices:
            order = len(matrix)
            work = work.reshape(len(work), order, -1).transpose(0, 2, 1).reshape(-1, order)
            work = (work @ matrix.astype(kind)).reshape(-1, self.size)
        result: Array = work.reshape(shape)
        return result

    @cached_property
    def matrix(self) -> Array:
        """R [n, n], float64."""
        return self.apply(np.eye(self.size))

    @cached_property
    def largest(self) -> float:
        """Largest magnitude of an entry."""
        return 1 / math.sqrt(self.size) if self.is_hadamard else float(np.abs(self.matrix).max())

    @cached_property
    def _parts(self) -> tuple[Array, list[Array]]:
        rng = np.random.default_rng([self.seed, self.size])
        signs = rng.choice(np.array([-1.0, 1.0]), self.size)
        known = factors(self.size)
        if known is None:
            power = self.size & -self.size
            odd = self.size // power
            orthogonal, upper = np.linalg.qr(rng.standard_normal((odd, odd)))
            return signs, [orthogonal * np.sign(np.diagonal(upper)), *_normalised(factors(power) or [])]
        return signs, _normalised(known)


def _normalised(matrices: list[Array]) -> list[Array]:
    return [matrix / math.sqrt(len(matrix)) for matrix in matrices]


@dataclass(frozen=True)
class Rotated(Transform):
    """x' = x R, piece by piece where x is longer than R.

    As after `Multiplied`, the mean of |x'| is what a normal distribution has, and the maximum is a bound.

    Attributes:
        rotation: R.
        channels: K, a multiple of the size of R.
    """

    rotation: Rotation
    channels: int

    @property
    def size(self) -> int:
        """K after the change."""
        return self.channels

    @property
    def digest(self) -> str:
        """Identifies what is done."""
        return f"rotated {self.channels} {self.rotation.digest}"

    def apply(self, moments: Moments) -> Moments:
        """Return the moments of the changed rows.

        Raises:
            ValueError: The moments have no H.
        """
        if moments.gram is None:
            raise ValueError("moments without H cannot be rotated")
        gram = self.rotation.apply(np.ascontiguousarray(self.rotation.apply(moments.gram).T))
        result = Moments(self.channels, True, moments.count, (gram + gram.T) / 2)
        result.total = self.rotation.apply(moments.total)
        result.square = np.maximum(np.diagonal(gram), 0).copy()
        result.absolute = _NORMAL * np.sqrt(result.square * moments.count)
        pieces = moments.largest.reshape(-1, self.rotation.size).sum(axis=1) * self.rotation.largest
        result.largest = np.minimum(np.repeat(pieces, self.rotation.size), np.sqrt(result.square))
        return result
