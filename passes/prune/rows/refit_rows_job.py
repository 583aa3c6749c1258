"""The recorded work of fitting the rows that are left of a matrix to what all of them computed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.ir.weights.jobs import TensorSpec, Tile, TileOutput, WeightJob
from onnxslim_llm.ir.weights.weight import Weight
from onnxslim_llm.stats.curvature import DAMPING, output_error
from onnxslim_llm.stats.statistics import StoredMoments

__all__ = ["RefitRowsJob", "fitted_rows"]

Array = NDArray[Any]


class RefitRowsJob(WeightJob):
    """Keep some rows of W[K, N], with the values that compute X W best from the inputs that are left.

    A column takes the new values where they are better on the samples that were held out.

    Args:
        source: The weight, stored [K, N] or [N, K].
        k_axis: Which of the source's two axes is K.
        kept: [K'] indices of rows.
        moments: Of all K inputs.
        name: Name of the weight, for messages.
    """

    def __init__(self, source: Weight, k_axis: int, kept: NDArray[np.int64], moments: StoredMoments, name: str) -> None:
        columns = source.shape[1 - k_axis]
        shape = (len(kept), columns) if k_axis == 0 else (columns, len(kept))
        self.inputs = (source,)
        self.outputs = (TensorSpec(shape, source.onnx_dtype),)
        self.k_axis, self.kept, self.moments, self.name = k_axis, kept, moments, name
        digest = hashlib.sha256(np.ascontiguousarray(kept, np.int64).tobytes()).hexdigest()
        self.fingerprint = f"refit rows v1 K={k_axis} {digest} {moments.digest}"

    def where(self) -> str:
        """Return the name of the weight."""
        return self.name

    def tiles(self) -> Sequence[Tile]:
        """Return the matrix as a whole: the equations are solved once for all columns."""
        rows = self.inputs[0].shape[self.k_axis]
        return [Tile(0, 1, 8 * (3 * rows * rows + 3 * self.inputs[0].size))]

    def run(self, tile: Tile) -> TileOutput:
        """Solve for all columns."""
        source = self.inputs[0].view()
        weight = np.asarray(source if self.k_axis == 0 else source.T, np.float32)
        collected = self.moments.load()
        assert collected.fit.gram is not None
        assert collected.held.gram is not None
        plain, fitted = weight[self.kept], fitted_rows(weight, self.kept, collected.fit.gram)
        held = collected.held.gram.astype(np.float32)
        errors = [output_error(_change(weight, self.kept, rows), held) for rows in (plain, fitted)]
        result = np.where(errors[1] < errors[0], fitted, plain).astype(source.dtype)
        stored = np.ascontiguousarray(result if self.k_axis == 0 else result.T)
        stats = {
            "output_error": float(np.minimum(*errors).sum()),
            "output_error_without_refit": float(errors[0].sum()),
            "output_signal": float(output_error(weight, held).sum()),
        }
        return TileOutput([(0, 0, stored.reshape(-1).view(np.uint8))], stats)

    def finish(self, stats: list[dict[str, float]]) -> dict[str, Any]:
        """Say what the missing rows cost."""
        total = super().finish(stats)
        if total["output_signal"]:
            total["relative_output_error"] = math.sqrt(total["output_error"] / total["output_signal"])
        return total


def fitted_rows(weight: Array, kept: NDArray[np.int64], gram: Array) -> Array:
    """Return V[K', N] that minimises ||X W - X_S V||^2 + damping ||W_S - V||^2.

    Args:
        weight: W [K, N].
        kept: S, [K'].
        gram: H = X^T X [K, K], float64.
    """
    damping = DAMPING * float(np.diagonal(gram).mean()) or 1.0
    left = gram[np.ix_(kept, kept)] + damping * np.eye(len(kept))
    right = gram[kept] @ weight.astype(np.float64) + damping * weight[kept]
    result: Array = np.linalg.solve(left, right).astype(np.float32)
    return result


def _change(weight: Array, kept: NDArray[np.int64], rows: Array) -> Array:
    """Return what is lost of W when only `rows` are left, in the places of all rows."""
    change = np.array(weight, np.float32)
    change[kept] -= rows
    return change
