"""Sparse packed weights that are made before the save, because nobody knows their size before."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from onnxslim_llm.ir.weights import ArrayWeight, DerivedWeight, Weight
from onnxslim_llm.ir.weights.jobs import TensorSpec, Tile, TileOutput, WeightJob, derive

__all__ = ["SparseCopies"]

_TILE_BYTES = 16 << 20


class _CopyJob(WeightJob):
    """Copy bytes; the figures are those of the work that made the weight dense.

    Args:
        source: uint8 [bytes].
        name: Name of the weight, for messages.
        figures: What that work found out.
    """

    def __init__(self, source: Weight, name: str, figures: dict[str, Any]) -> None:
        self.inputs = (source,)
        self.outputs = (TensorSpec(source.shape, source.onnx_dtype),)
        self.name, self._figures = name, figures
        self.fingerprint = "sparse copy v1"

    def where(self) -> str:
        """Return the name of the weight."""
        return self.name

    def tiles(self) -> Sequence[Tile]:
        """Return ranges of bytes."""
        size = self.outputs[0].nbytes
        return [Tile(a, min(a + _TILE_BYTES, size), 2 * _TILE_BYTES) for a in range(0, size, _TILE_BYTES)]

    def run(self, tile: Tile) -> TileOutput:
        """Copy a range."""
        return TileOutput([(0, tile.start, self.inputs[0].view()[tile.start : tile.stop])])

    def finish(self, stats: list[dict[str, float]]) -> dict[str, Any]:
        """Return the figures."""
        return self._figures


@dataclass
class SparseCopies:
    """Keeps weights of known bytes in a file without a name, so that they take no memory until they are saved."""

    _file: IO[bytes] = field(default_factory=tempfile.TemporaryFile)
    _ranges: list[tuple[int, int, Weight, str]] = field(default_factory=list)

    def add(self, data: NDArray[np.uint8], dense: Weight, name: str) -> None:
        """Keep the sparse form of a weight.

        Args:
            data: uint8 [bytes].
            dense: What it was made of.
            name: Of the constant.
        """
        start = self._file.tell()
        self._file.write(data.tobytes())
        self._ranges.append((start, data.size, dense, name))

    def weights(self) -> list[Weight]:
        """Return what was kept, in the order in which it came."""
        if not self._ranges:
            return []
        self._file.flush()
        mapped = np.memmap(self._file, np.uint8, "r")
        return [_with_figures(ArrayWeight(mapped[a : a + n]), dense, name) for a, n, dense, name in self._ranges]


def _with_figures(sparse: Weight, dense: Weight, name: str) -> Weight:
    if not isinstance(dense, DerivedWeight) or dense.job.figures is None:
        return sparse
    assert sparse.onnx_dtype == TensorProto.UINT8, name
    (copied,) = derive(_CopyJob(sparse, dense.job.where(), dense.job.figures))
    return copied
