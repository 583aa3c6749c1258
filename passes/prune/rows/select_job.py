"""The recorded work of leaving out entries of a weight along an axis."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.ir.weights.jobs import DerivedWeight, TensorSpec, Tile, TileOutput, WeightJob, derive
from onnxslim_llm.ir.weights.weight import Weight

__all__ = ["SelectJob", "selected"]

#: Input bytes of a tile.
_TILE_BYTES = 32 << 20


class SelectJob(WeightJob):
    """Keep some entries of a weight along one axis.

    Args:
        source: Of whole-byte elements.
        axis: 0 or larger.
        kept: Indices along the axis, in the new order.
        name: Name of the weight, for messages.
    """

    def __init__(self, source: Weight, axis: int, kept: NDArray[np.int64], name: str) -> None:
        shape = (*source.shape[:axis], len(kept), *source.shape[axis + 1 :])
        self.inputs = (source,)
        self.outputs = (TensorSpec(shape, source.onnx_dtype),)
        self.axis, self.kept, self.name = axis, np.ascontiguousarray(kept, np.int64), name
        self.fingerprint = f"select v1 axis={axis} {hashlib.sha256(self.kept.tobytes()).hexdigest()}"

    def where(self) -> str:
        """Return the name of the weight."""
        return self.name

    def tiles(self) -> Sequence[Tile]:
        """Return ranges of rows of the result."""
        spec = self.outputs[0]
        rows = spec.shape[0]
        width = max(1, spec.nbytes // max(1, rows))
        step = max(1, _TILE_BYTES // width)
        return [Tile(a, min(a + step, rows), 3 * width * min(step, rows - a)) for a in range(0, rows, step)]

    def run(self, tile: Tile) -> TileOutput:
        """Copy a range of rows."""
        source: NDArray[Any] = self.inputs[0].view()
        part = slice(tile.start, tile.stop)
        piece = source[self.kept[part]] if self.axis == 0 else source[part].take(self.kept, self.axis)
        spec = self.outputs[0]
        start = spec.nbytes // spec.shape[0] * tile.start
        return TileOutput([(0, start, np.ascontiguousarray(piece).reshape(-1).view(np.uint8))])


def selected(source: Weight, axis: int, kept: NDArray[np.int64], name: str) -> DerivedWeight:
    """Return the weight with `kept` entries along an axis; nothing is copied yet."""
    (result,) = derive(SelectJob(source, axis, kept, name))
    return result
