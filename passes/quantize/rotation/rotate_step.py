"""A rotation as recorded work on a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.passes.quantize.rotation.rotation import Rotation
from onnxslim_llm.products.transform_job import Step

__all__ = ["Rotate"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Rotate(Step):
    """Multiply the vectors along the axis by an orthogonal matrix: v' = v R.

    Attributes:
        rotation: R.
    """

    mixes: ClassVar[bool] = True

    rotation: Rotation

    def apply(self, matrix: Array, part: slice) -> Array:
        """Return the rotated piece."""
        moved = np.moveaxis(matrix, self.axis, -1)
        return np.moveaxis(self.rotation.apply(np.ascontiguousarray(moved)), -1, self.axis)

    @property
    def digest(self) -> str:
        """Identifies what is done."""
        return f"rotate axis {self.axis} {self.rotation.digest}"
