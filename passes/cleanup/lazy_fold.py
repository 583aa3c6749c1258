"""Folding of large weights: recorded as views and casts, computed when the artifact is saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.ir.weights import ViewWeight, Weight, dtypes
from onnxslim_llm.ir.weights.jobs import TensorSpec, Tile, TileOutput, WeightJob, derive

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined]  # Python 3.12

__all__ = ["CastJob", "lazy_fold"]

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_RESHAPING = frozenset(["Reshape", "Squeeze", "Unsqueeze", "Flatten"])
#: Elements of a tile: 8 MiB of float32.
_TILE_ELEMENTS = 2 << 20
_BYTE = 8


class CastJob(WeightJob):
    """Round a floating-point weight to another floating-point type, to nearest, ties to even.

    Args:
        source: What is cast.
        to: Element type of the result, a `TensorProto.DataType`.
        name: Name of the weight, for messages.
    """

    def __init__(self, source: Weight, to: int, name: str) -> None:
        self.inputs = (source,)
        self.outputs = (TensorSpec(source.shape, to),)
        self.fingerprint = f"cast {source.onnx_dtype} -> {to} v1"
        self._name = name

    def tiles(self) -> Sequence[Tile]:
        """Return ranges of the flattened elements."""
        size = self.inputs[0].size
        return [
            Tile(start, min(start + _TILE_ELEMENTS, size), 2 * _TILE_ELEMENTS * self._bytes(self.inputs[0].onnx_dtype))
            for start in range(0, size, _TILE_ELEMENTS)
        ]

    def run(self, tile: Tile) -> TileOutput:
        """Cast one range."""
        source, to = self.inputs[0], self.outputs[0].onnx_dtype
        item = self._bytes(source.onnx_dtype)
        flat = source.view().reshape(-1)
        with np.errstate(over="ignore"):  # what is too large becomes infinite, as in the graph
            cast = flat[tile.start : tile.stop].astype(dtypes.numpy_dtype(to))
        data: Buffer = dtypes.pack(cast, to)
        reads = [(0, tile.start * item, tile.stop * item)]
        return TileOutput([(0, tile.start * self._bytes(to), data)], {}, reads)

    def where(self) -> str:
        """Return the weight's name."""
        return self._name

    @staticmethod
    def _bytes(onnx_type: int) -> int:
        return dtypes.bits_of(onnx_type) // _BYTE


def lazy_fold(node: gs.Node, weight: Weight, shared: bool, shape: tuple[int, ...] | None) -> Weight | str:
    """Return the weight that `node` makes of `weight` without computing it, or why it is left alone.

    Args:
        node: A node whose inputs are constants.
        weight: Its first input.
        shared: Whether something else reads that input, too.
        shape: Shape of the result, if it is known.
    """
    if node.op == "Identity":
        return weight
    if node.op in _RESHAPING:
        return "its shape is unknown" if shape is None else ViewWeight.reshape(weight, shape)
    if node.op == "Transpose":
        if shared:
            return "the weight is used elsewhere too: folding would store it twice"
        perm = node.attrs.get("perm")
        return ViewWeight.transpose(weight, None if perm is None else tuple(perm))
    if node.op == "Cast":
        return _lazy_cast(node, weight, shared)
    return "it computes on a large weight"


def _lazy_cast(node: gs.Node, weight: Weight, shared: bool) -> Weight | str:
    to: Any = dtypes.onnx_dtype(node.attrs["to"])
    if weight.onnx_dtype not in _FLOATS or to not in _FLOATS:
        return "it casts a large weight to or from a type that is no float"
    if shared:
        return "the weight is used elsewhere too: folding would store it twice"
    if dtypes.bits_of(to) > dtypes.bits_of(weight.onnx_dtype):
        return "the weight would become larger"
    return derive(CastJob(weight, to, node.outputs[0].name))[0]
