"""Weights laid side by side, without loading any of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from onnxslim_llm.ir.weights import dtypes
from onnxslim_llm.ir.weights.views import ViewWeight
from onnxslim_llm.ir.weights.weight import CHUNK_BYTES, Weight

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined]  # Python 3.12

__all__ = ["ConcatWeight"]


class ConcatWeight(Weight):
    """The concatenation of weights along an axis; `concatenate` also knows when a transposed order streams better.

    Args:
        parts: Of one type and rank, with equal sizes but for `axis`.
        axis: 0 or larger.

    Raises:
        ValueError: They do not fit together, or elements are smaller than a byte.
    """

    def __init__(self, parts: Sequence[Weight], axis: int) -> None:
        first = parts[0]
        rest = [size for i, size in enumerate(first.shape) if i != axis]
        for part in parts:
            fits = len(part.shape) == len(first.shape) and part.onnx_dtype == first.onnx_dtype
            if not fits or axis >= len(part.shape) or [s for i, s in enumerate(part.shape) if i != axis] != rest:
                raise ValueError(f"{part} and {first} cannot be concatenated along axis {axis}")
        if dtypes.bits_of(first.onnx_dtype) % 8:
            raise ValueError(f"{first} is packed below a byte")
        shape = list(first.shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        super().__init__(tuple(shape), first.onnx_dtype)
        self.parts = tuple(parts)
        self.axis = axis

    @classmethod
    def concatenate(cls, parts: Sequence[Weight], axis: int) -> Weight:
        """Concatenate; transposed views of matrices become one transposed view of their concatenated bases."""
        bases = [part.base for part in parts if isinstance(part, ViewWeight) and part.op == ("transpose", (1, 0))]
        if len(bases) == len(parts):
            return ViewWeight.transpose(cls(bases, 1 - axis))
        return cls(parts, axis)

    @property
    def storage_key(self) -> Hashable:
        """Identity of the raw bytes, see `Weight.storage_key`."""
        return ("concat", self.axis, tuple(part.key for part in self.parts))

    def view(self) -> np.ndarray:
        """Return the content, see `Weight.view`."""
        return self._shared(lambda: np.concatenate([part.view() for part in self.parts], self.axis))

    def raw(self) -> Buffer:
        """Return the raw bytes, see `Weight.raw`."""
        return dtypes.pack(self.view(), self.onnx_dtype)

    def release(self, start: int = 0, stop: int | None = None) -> None:
        """Drop mapped pages, see `Weight.release`."""
        for part in self.parts:
            part.release()

    def chunks(self, limit: int = CHUNK_BYTES) -> Iterator[tuple[int, Buffer]]:
        """Yield the raw content in pieces, see `Weight.chunks`."""
        if self.axis == 0:
            done = 0
            for part in self.parts:
                for start, data in part.chunks(limit):
                    yield done + start, data
                    part.release(start, start + len(memoryview(data)))
                done += part.nbytes
            return
        rows = self.shape[0]
        width = self.nbytes // rows if rows else 0
        step = max(1, limit // width) if width else 1
        views = [part.view() for part in self.parts]
        for first in range(0, rows if self.nbytes else 0, step):
            piece = np.concatenate([view[first : first + step] for view in views], self.axis)
            yield first * width, dtypes.pack(piece, self.onnx_dtype)
            for part in self.parts:
                part_width = part.nbytes // rows
                part.release(first * part_width, (first + step) * part_width)
