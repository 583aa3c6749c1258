"""The recorded work of linear changes of a weight along its axes: scaling, centring, and what passes add."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.ir.weights.jobs import DerivedWeight, TensorSpec, Tile, TileOutput, WeightJob, derive
from onnxslim_llm.ir.weights.weight import Weight

__all__ = ["Centre", "Scale", "Step", "TransformJob", "transformed"]

Array = NDArray[Any]

#: Input bytes of a tile.
_TILE_BYTES = 32 << 20


@dataclass(frozen=True)
class Step(ABC):
    """A linear change of the vectors along one axis of a weight.

    Class attributes:
        mixes: Whether an element of the result depends on others than the one in its place.

    Attributes:
        axis: 0 or 1.
    """

    mixes: ClassVar[bool]

    axis: int

    @abstractmethod
    def apply(self, matrix: Array, part: slice) -> Array:
        """Return the changed piece of a weight; `part` of the axis, which is all of it where the step mixes."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Identifies what is done."""


@dataclass(frozen=True)
class Scale(Step):
    """Multiply each element along the axis by its own factor.

    Attributes:
        factor: One for each place along the axis.
    """

    mixes: ClassVar[bool] = False

    factor: Array = field(repr=False)

    def apply(self, matrix: Array, part: slice) -> Array:
        """Return the scaled piece."""
        factor = self.factor[part].astype(matrix.dtype)
        result: Array = matrix * (factor if self.axis == matrix.ndim - 1 else factor[:, None])
        return result

    @property
    def digest(self) -> str:
        """Identifies what is done."""
        content = np.ascontiguousarray(self.factor, np.float64).tobytes()
        return f"scale axis {self.axis} {hashlib.sha256(content).hexdigest()}"


@dataclass(frozen=True)
class Centre(Step):
    """Subtract their mean from the vectors along the axis."""

    mixes: ClassVar[bool] = True

    def apply(self, matrix: Array, part: slice) -> Array:
        """Return the piece with means of zero."""
        mean = matrix.mean(axis=self.axis, keepdims=True, dtype=np.float64)
        result: Array = (matrix - mean).astype(matrix.dtype)
        return result

    @property
    def digest(self) -> str:
        """Identifies what is done."""
        return f"centre axis {self.axis}"


class TransformJob(WeightJob):
    """A weight after some steps, computed in float32 (float64 where it is that) and stored in its own type.

    Args:
        source: A vector or matrix of a float type.
        steps: In order.
        name: For messages.
    """

    def __init__(self, source: Weight, steps: Sequence[Step], name: str) -> None:
        self.inputs = (source,)
        self.outputs = (TensorSpec(source.shape, source.onnx_dtype),)
        self.steps = tuple(steps)
        self.name = name
        self.fingerprint = " ".join(["transform v1", *(step.digest for step in steps)])

    def where(self) -> str:
        """Return the name of the weight."""
        return self.name

    @property
    def _tiled_axis(self) -> int | None:
        """The axis along which pieces are independent of each other; None if there is none."""
        mixed = {step.axis for step in self.steps if step.mixes}
        return next((axis for axis in range(len(self.outputs[0].shape)) if axis not in mixed), None)

    def tiles(self) -> Sequence[Tile]:
        """Return ranges along the axis that no step mixes; the whole weight if there is none."""
        axis, shape = self._tiled_axis, self.outputs[0].shape
        nbytes = self.inputs[0].nbytes
        if axis is None:
            return [Tile(0, shape[0] if shape else 1, 4 * nbytes)]
        count = shape[axis]
        line = max(1, nbytes // max(1, count))
        step = max(1, _TILE_BYTES // line)
        return [Tile(a, min(a + step, count), 4 * line * min(step, count - a)) for a in range(0, count, step)]

    def run(self, tile: Tile) -> TileOutput:
        """Compute one range."""
        source, axis = self.inputs[0], self._tiled_axis
        whole = source.view()
        part = slice(tile.start, tile.stop)
        piece = whole if axis is None else whole[part] if axis == 0 else whole[:, part]
        result = piece.astype(np.promote_types(np.float32, piece.dtype) if piece.dtype == np.float64 else np.float32)
        for step in self.steps:
            result = step.apply(result, part if step.axis == axis else slice(None))
        stored = np.ascontiguousarray(result.astype(whole.dtype))
        raw = stored.view(np.uint8).reshape(-1) if stored.ndim else stored.reshape(1).view(np.uint8)
        width = whole.dtype.itemsize
        if axis != 1:
            line = width * int(np.prod(whole.shape[1:], dtype=np.int64))
            start = 0 if axis is None else tile.start * line
            return TileOutput([(0, start, raw)], reads=[(0, start, start + raw.size)])
        span = width * (tile.stop - tile.start)
        offset, stride = width * tile.start, width * whole.shape[1]
        return TileOutput([(0, r * stride + offset, raw[r * span : (r + 1) * span]) for r in range(len(whole))])


def transformed(weight: Weight, name: str, *steps: Step) -> Weight:
    """Return a weight after some steps; those of an earlier call become part of the same work."""
    if isinstance(weight, DerivedWeight) and isinstance(weight.job, TransformJob):
        return derive(TransformJob(weight.job.inputs[0], (*weight.job.steps, *steps), name))[0]
    return derive(TransformJob(weight, steps, name))[0]
