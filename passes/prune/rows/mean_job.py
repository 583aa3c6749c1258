"""The recorded work of adding to a bias what left out rows of a weight make on average."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.ir.weights.jobs import TensorSpec, Tile, TileOutput, WeightJob
from onnxslim_llm.ir.weights.weight import Weight

__all__ = ["MeanJob"]


class MeanJob(WeightJob):
    """b + m W[S], with the rows S of the weight W that are left out.

    Args:
        bias: b, N elements of a float type.
        source: W as it was, stored [K, N] or [N, K].
        k_axis: Which of its two axes is K.
        rows: S.
        means: m, of the inputs of these rows; times a factor of the product, if it has one.
        name: Name of the bias, for messages.
    """

    def __init__(
        self,
        bias: Weight,
        source: Weight,
        k_axis: int,
        rows: NDArray[np.int64],
        means: NDArray[np.float64],
        name: str,
    ) -> None:
        self.inputs = (bias, source)
        self.outputs = (TensorSpec(bias.shape, bias.onnx_dtype),)
        self.k_axis, self.rows, self.means, self.name = k_axis, rows, means, name
        digest = hashlib.sha256(np.ascontiguousarray(rows).tobytes() + np.ascontiguousarray(means).tobytes())
        self.fingerprint = f"mean v1 K={k_axis} {digest.hexdigest()}"

    def where(self) -> str:
        """Return the name of the bias."""
        return self.name

    def tiles(self) -> Sequence[Tile]:
        """Return the whole: it is one row."""
        return [Tile(0, 1, 16 * len(self.rows) * self.inputs[1].shape[1 - self.k_axis])]

    def run(self, tile: Tile) -> TileOutput:
        """Add the mean."""
        bias: NDArray[Any] = self.inputs[0].view()
        left_out = self.inputs[1].view().take(self.rows, self.k_axis).astype(np.float64)
        mean = self.means @ (left_out if self.k_axis == 0 else left_out.T)
        result = (bias.astype(np.float64) + mean.reshape(bias.shape)).astype(bias.dtype)
        return TileOutput([(0, 0, np.ascontiguousarray(result).reshape(-1).view(np.uint8))])
