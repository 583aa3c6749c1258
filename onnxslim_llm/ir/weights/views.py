"""Weights that show another weight's content differently, without touching it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from onnxslim_llm.ir.weights import dtypes
from onnxslim_llm.ir.weights.weight import CHUNK_BYTES, Weight

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined]  # Python 3.12

__all__ = ["AliasWeight", "ViewWeight"]


class ViewWeight(Weight):
    """A transposed or reshaped view of another weight.

    Args:
        base: The weight underneath.
        op: ("transpose", permutation) or ("reshape", new shape).

    Raises:
        ValueError: The operation does not fit the base's shape.
    """

    def __init__(self, base: Weight, op: tuple[str, tuple[int, ...]]) -> None:
        kind, argument = op[0], tuple(int(value) for value in op[1])
        if kind == "transpose":
            if sorted(argument) != list(range(len(base.shape))):
                raise ValueError(f"{argument} does not permute the axes of {base}")
            shape = tuple(base.shape[axis] for axis in argument)
        elif kind == "reshape":
            if math.prod(argument) != base.size:
                raise ValueError(f"{base} cannot be reshaped to {argument}")
            shape = argument
        else:
            raise ValueError(f"unknown view '{kind}'")
        super().__init__(shape, base.onnx_dtype, base.nbytes)
        self.base = base
        self.op = (kind, argument)

    @classmethod
    def transpose(cls, base: Weight, permutation: tuple[int, ...] | None = None) -> ViewWeight:
        """View `base` with its axes permuted (default: reversed)."""
        axes = tuple(reversed(range(len(base.shape)))) if permutation is None else permutation
        return cls(base, ("transpose", axes))

    @classmethod
    def reshape(cls, base: Weight, shape: tuple[int, ...]) -> ViewWeight:
        """View `base` under another shape of as many elements."""
        return cls(base, ("reshape", shape))

    @property
    def storage_key(self) -> Hashable:
        """Identity of the raw bytes, see `Weight.storage_key`."""
        # A reshape keeps the order of the bytes.
        return self.base.storage_key if self.op[0] == "reshape" else ("view", self.base.key, self.op)

    @property
    def storage(self) -> Weight:
        """The weight whose bytes are stored, see `Weight.storage`."""
        return self.base.storage if self.op[0] == "reshape" else self

    def view(self) -> np.ndarray:
        """Return the content, see `Weight.view`."""
        kind, argument = self.op
        array = self.base.view()
        return array.transpose(argument) if kind == "transpose" else array.reshape(argument)

    def raw(self) -> Buffer:
        """Return the raw bytes, see `Weight.raw`."""
        if self.op[0] == "reshape":
            return self.base.raw()
        return dtypes.pack(self.view(), self.onnx_dtype)

    def release(self, start: int = 0, stop: int | None = None) -> None:
        """Drop mapped pages, see `Weight.release`."""
        if self.op[0] == "reshape":
            self.base.release(start, stop)
        else:
            self.base.release()

    def chunks(self, limit: int = CHUNK_BYTES) -> Iterator[tuple[int, Buffer]]:
        """Yield the raw content in pieces, see `Weight.chunks`."""
        if self.op[0] == "reshape":
            yield from self.base.chunks(limit)
            return
        bits = dtypes.bits_of(self.onnx_dtype)
        if len(self.shape) < 2 or not self.nbytes or bits % 8:
            yield from super().chunks(limit)
            return
        yield from self._row_chunks(limit)

    def _row_chunks(self, limit: int) -> Iterator[tuple[int, Buffer]]:
        # Rows of a transposed view are columns of the file: every piece walks through the whole base, so that the
        # base's pages are dropped block by block, or all of it would become resident.
        view = self.view()
        row_bytes = self.nbytes // self.shape[0]
        rows = max(1, limit // row_bytes)
        strides = [abs(stride) for stride in view.strides]
        outer = strides.index(max(strides))
        step = max(1, limit // max(1, strides[outer]))
        for start in range(0, self.shape[0], rows):
            part = view[start : start + rows]
            if outer == 0:
                piece = np.ascontiguousarray(part)
                self.base.release()
            else:
                piece = np.empty(part.shape, part.dtype)
                for first in range(0, part.shape[outer], step):
                    block = (slice(None),) * outer + (slice(first, first + step),)
                    piece[block] = part[block]
                    self.base.release(first * strides[outer], (first + step) * strides[outer])
            yield start * row_bytes, dtypes.pack(piece, self.onnx_dtype)


class AliasWeight(Weight):
    """The same raw bytes under another type and shape, e.g. int4 [V, D] seen as uint8 [V, D/2]. Saved once.

    Args:
        base: The weight whose bytes are shown.
        shape: Dimensions to show.
        onnx_dtype: Element type to show.

    Raises:
        ValueError: The sizes in bytes differ.
    """

    def __init__(self, base: Weight, shape: tuple[int, ...], onnx_dtype: int) -> None:
        super().__init__(shape, onnx_dtype)
        if self.nbytes != base.nbytes:
            raise ValueError(f"{base} has {base.nbytes} bytes, {self} needs {self.nbytes}")
        self.base = base

    @property
    def storage_key(self) -> Hashable:
        """Identity of the raw bytes, see `Weight.storage_key`."""
        return self.base.storage_key

    @property
    def storage(self) -> Weight:
        """The weight whose bytes are stored, see `Weight.storage`."""
        return self.base.storage

    def raw(self) -> Buffer:
        """Return the raw bytes, see `Weight.raw`."""
        return self.base.raw()

    def release(self, start: int = 0, stop: int | None = None) -> None:
        """Drop mapped pages, see `Weight.release`."""
        self.base.release(start, stop)

    def chunks(self, limit: int = CHUNK_BYTES) -> Iterator[tuple[int, Buffer]]:
        """Yield the raw content in pieces, see `Weight.chunks`."""
        return self.base.chunks(limit)
