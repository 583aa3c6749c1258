"""What passes do to the input of a product, so that statistics collected before them stay true after them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.stats.moments import Moments

__all__ = ["Kept", "Multiplied", "Scaled", "Transform"]

Array = NDArray[Any]

#: Mean of |x| over the root of the mean of x², for a normal distribution.
_NORMAL = float(np.sqrt(2 / np.pi))


class Transform(ABC):
    """A linear change of the rows x [K] that enter a product."""

    @abstractmethod
    def apply(self, moments: Moments) -> Moments:
        """Return the moments of the changed rows."""

    @property
    @abstractmethod
    def size(self) -> int:
        """K after the change."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Identifies what is done."""


@dataclass(frozen=True)
class Scaled(Transform):
    """x' = x * factor.

    Attributes:
        factor: [K], positive.
    """

    factor: Array = field(repr=False)

    @property
    def size(self) -> int:
        """K after the change."""
        return len(self.factor)

    @property
    def digest(self) -> str:
        """Identifies what is done."""
        return _digest("scaled", self.factor)

    def apply(self, moments: Moments) -> Moments:
        """Return the moments of the changed rows."""
        f = np.asarray(self.factor, np.float64)
        gram = None if moments.gram is None else moments.gram * f[:, None] * f
        result = Moments(moments.size, gram is not None, moments.count, gram)
        result.total, result.absolute, result.largest = moments.total * f, moments.absolute * f, moments.largest * f
        result.square = moments.square * f**2
        return result


@dataclass(frozen=True)
class Kept(Transform):
    """x' = x[channels].

    Attributes:
        channels: [K'] indices, in the new order.
    """

    channels: Array = field(repr=False)

    @property
    def size(self) -> int:
        """K after the change."""
        return len(self.channels)

    @property
    def digest(self) -> str:
        """Identifies what is done."""
        return _digest("kept", self.channels)

    def apply(self, moments: Moments) -> Moments:
        """Return the moments of the changed rows."""
        kept = self.channels
        gram = None if moments.gram is None else moments.gram[np.ix_(kept, kept)]
        result = Moments(len(kept), gram is not None, moments.count, gram)
        for name in ("total", "absolute", "square", "largest"):
            setattr(result, name, getattr(moments, name)[kept])
        return result


@dataclass(frozen=True)
class Multiplied(Transform):
    """x' = x M.

    The mean of |x'| is what a normal distribution of its mean square has, and the maximum is a bound: no more is known.

    Attributes:
        matrix: M [K, K'].
    """

    matrix: Array = field(repr=False)

    @property
    def size(self) -> int:
        """K after the change."""
        return int(self.matrix.shape[1])

    @property
    def digest(self) -> str:
        """Identifies what is done."""
        return _digest("multiplied", self.matrix)

    def apply(self, moments: Moments) -> Moments:
        """Return the moments of the changed rows.

        Raises:
            ValueError: The moments have no H: their channels alone do not say what sums of them do.
        """
        if moments.gram is None:
            raise ValueError("moments without H cannot be multiplied by a matrix")
        m = np.asarray(self.matrix, np.float64)
        gram = m.T @ moments.gram @ m
        result = Moments(self.size, True, moments.count, gram)
        result.total = moments.total @ m
        result.square = np.maximum(np.diagonal(gram), 0).copy()
        result.absolute = _NORMAL * np.sqrt(result.square * moments.count)
        result.largest = np.minimum(moments.largest @ np.abs(m), np.sqrt(result.square))
        return result


def _digest(kind: str, array: Array) -> str:
    content = np.ascontiguousarray(array)
    head = f"{kind} {content.dtype} {content.shape}\n".encode()
    return hashlib.sha256(head + content.tobytes()).hexdigest()
