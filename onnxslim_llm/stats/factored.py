"""Moments of what a weight that is still to be computed makes of an input."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from onnxslim_llm.ir.weights.weight import Weight
from onnxslim_llm.stats.moments import Moments
from onnxslim_llm.stats.transforms import Multiplied, Transform

__all__ = ["Through"]


@dataclass(frozen=True)
class Through(Transform):
    """x' = x A, with A read only when the moments are: H' = A^T H A.

    Attributes:
        weight: A [K, K'], usually recorded work.
    """

    weight: Weight = field(repr=False)

    @property
    def size(self) -> int:
        """K'."""
        return self.weight.shape[1]

    @property
    def digest(self) -> str:
        """Identifies what is done."""
        return f"through {self.weight.digest().hex()}"

    def apply(self, moments: Moments) -> Moments:
        """Return the moments of the changed rows.

        Raises:
            ValueError: The moments have no H.
        """
        return Multiplied(self.weight.view().astype(np.float32)).apply(moments)
