"""The recorded work of storing a constant operand in an activation's codes, and a bias in int32."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from onnxslim_llm.ir.weights import Weight, dtypes
from onnxslim_llm.ir.weights.jobs import TensorSpec, Tile, TileOutput, WeightJob
from onnxslim_llm.stats.grid import Grid
from onnxslim_llm.targets.qdq_rules import ActivationType

__all__ = ["LARGEST_BIAS", "BiasJob", "OperandJob"]

_PIECE = 4 << 20  # elements
_COPIES = 4
_VERSION = 1
#: Codes of a bias stay within half of int32: the other half is for the sum of products that it is added to.
LARGEST_BIAS = 2**30


class OperandJob(WeightJob):
    """Code a constant with a scale and a zero point that are known.

    Args:
        source: The constant; any float type.
        kind: Element type of the codes.
        grid: Their range.
        scale: Value of one step.
        zero: Code of 0.
        name: Name of the constant, for messages.
    """

    def __init__(
        self, source: Weight, kind: ActivationType, grid: Grid, scale: np.float32, zero: int, name: str
    ) -> None:
        self.inputs = (source,)
        self.grid, self.scale, self.zero, self.name = grid, scale, zero, name
        self.outputs = (TensorSpec(source.shape, int(getattr(TensorProto, kind.upper()))),)
        self.fingerprint = f"operand v{_VERSION} {kind} {float(scale).hex()} {zero}"

    def where(self) -> str:
        """Return the name of the constant."""
        return self.name

    def tiles(self) -> Sequence[Tile]:
        """Return ranges of elements."""
        count = self.inputs[0].size
        return [
            Tile(start, min(start + _PIECE, count), _COPIES * 4 * min(_PIECE, count - start))
            for start in range(0, count, _PIECE)
        ]

    def run(self, tile: Tile) -> TileOutput:
        """Code a range of elements."""
        values = self.inputs[0].view().reshape(-1)[tile.start : tile.stop].astype(np.float32)
        codes = np.clip(np.rint(values / self.scale) + self.zero, self.grid.lowest, self.grid.highest)
        dtype = dtypes.numpy_dtype(self.outputs[0].onnx_dtype)
        assert dtype is not None
        return TileOutput([(0, tile.start * dtype.itemsize, codes.astype(dtype).view(np.uint8))])


class BiasJob(WeightJob):
    """Code a bias [N] in units of input scale * weight scale: int32 codes, and the scales that they have.

    Args:
        bias: The bias.
        scales: The weight's scales, [N] or a scalar.
        input_scale: Value of one step of the input.
        factor: What the bias is multiplied with first (beta of Gemm).
        name: Name of the bias, for messages.
    """

    def __init__(self, bias: Weight, scales: Weight, input_scale: np.float32, name: str, factor: float = 1.0) -> None:
        self.inputs = (bias, scales)
        self.input_scale, self.factor, self.name = input_scale, factor, name
        self.outputs = (TensorSpec(bias.shape, int(TensorProto.INT32)), TensorSpec(scales.shape, scales.onnx_dtype))
        text = f"bias v{_VERSION} {float(input_scale).hex()} {float(factor).hex()}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def where(self) -> str:
        """Return the name of the bias."""
        return self.name

    def tiles(self) -> Sequence[Tile]:
        """Return the whole."""
        return [Tile(0, 1, 8 * _COPIES * self.inputs[0].size)]

    def run(self, tile: Tile) -> TileOutput:
        """Code all elements."""
        bias, scales = (weight.view().astype(np.float64) for weight in self.inputs)
        steps = scales * float(self.input_scale)
        codes = np.clip(np.rint(bias * self.factor / steps), -LARGEST_BIAS, LARGEST_BIAS).astype(np.int32)
        stored: NDArray[Any] = steps.astype(dtypes.numpy_dtype(self.outputs[1].onnx_dtype))
        writes = [(0, 0, codes.reshape(-1).view(np.uint8)), (1, 0, stored.reshape(-1).view(np.uint8))]
        return TileOutput([(i, at, data) for i, at, data in writes])
