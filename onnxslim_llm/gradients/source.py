"""What passes ask about gradients; knows no torch, so that passes can speak of it without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["Figure", "GradientSource", "StoredFigures"]

Figure = Literal["absolute", "squared"]
"""Of the gradient g of the log likelihood of the model's own answers: the mean of |g|, or of g^2 over tokens.

The second is the diagonal of the Fisher information: 1/2 w^2 E[g^2] is, to second order, the KL divergence to the model
without the weight w (LeCun et al. 1989, "Optimal Brain Damage", with the model's own answers for labels).
"""


@dataclass(frozen=True)
class StoredFigures:
    """Where the figures of one weight lie.

    Attributes:
        file: An .npy file: float32, of the weight's shape as it is stored.
        digest: SHA-256 of the content.
    """

    file: Path
    digest: str

    def view(self) -> NDArray[Any]:
        """Return the figures, mapped."""
        found: NDArray[Any] = np.load(self.file, mmap_mode="r")
        return found


class GradientSource(Protocol):
    """Computes figures of gradients on the calibration data."""

    def check(self) -> None:
        """Check that what computes them is there.

        Raises:
            ResourceError: Torch is not installed.
        """
        ...

    def figures(self, model: Model, weights: Sequence[str], figure: Figure) -> Mapping[str, StoredFigures]:
        """Return a figure for every element of some weights, at the point where the model is now.

        Args:
            model: The model between two passes.
            weights: Names of initializers that MatMul or Gemm nodes read.
            figure: Which one.

        Raises:
            ModelError: An operator on the way has no gradient (it is named), or the model does not run on the data.
            ResourceError: Torch is not installed.
        """
        ...
