"""The recorded work of putting few-bit weights that a model already holds into another layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from onnxslim_llm.concepts.block_weights import Accuracy, BlockJob, BlockLayout
from onnxslim_llm.concepts.packed_weights import PackedBlockJob
from onnxslim_llm.custom_ops.layout import BlockSpec, Layout, TileBuffers, column_alignment
from onnxslim_llm.custom_ops.packed import STRIP_COLUMNS
from onnxslim_llm.custom_ops.packing import pack, unpack
from onnxslim_llm.ir.weights.jobs import TensorSpec, Tile, TileOutput
from onnxslim_llm.passes.lower.stored.stored_sources import Columns, RangeSource, StoredSource, WidenedSource

__all__ = ["StoredJob", "widened"]

Array = NDArray[Any]

#: Part of the fingerprint: raise it when the same source gives other bytes.
_VERSION = 1
_NARROW = 3  # the width that no runtime's own operators have
_TILE_BYTES = 4 << 20  # of codes: unpacking takes several times as much

_SIGNED = {2: TensorProto.INT2, 3: TensorProto.INT4, 4: TensorProto.INT4, 8: TensorProto.INT8}
_UNSIGNED = {2: TensorProto.UINT2, 3: TensorProto.UINT4, 4: TensorProto.UINT4, 8: TensorProto.UINT8}
_SCALE = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


class StoredJob(BlockJob):
    """Copy codes, scales and zero points; no number changes.

    Args:
        source: What holds them.
        name: Name of the weight, for messages.
        accuracy: The least precision of the product that was found with it.
        layout: Byte layout of the result.
    """

    def __init__(
        self, source: StoredSource, name: str, accuracy: Accuracy | None, layout: BlockLayout = "blocked_kn"
    ) -> None:
        self.source, self.name, self.accuracy, self.layout = source, name, accuracy, layout
        self.inputs = source.weights
        self.scheme, self.rows, self.columns = source.scheme, source.rows, source.columns
        self.stored_block = source.scheme.block
        self.outputs = self._specs()
        self.fingerprint = f"stored v{_VERSION} {source.described} {layout}"

    def with_layout(self, layout: BlockLayout) -> StoredJob:
        """Return the same work with its result in another layout."""
        return StoredJob(self.source, self.name, self.accuracy, layout)

    def where(self) -> str:
        """Return the name of the weight."""
        return self.name

    def halves(self) -> tuple[StoredJob, StoredJob] | None:
        """Return the work of copying the first and the second half of the columns; None where that is impossible."""
        width, rest = divmod(self.columns, 2)
        if rest or width % self.source.alignment:
            return None
        sources = (RangeSource(self.source, 0, width), RangeSource(self.source, width, self.columns))
        first, second = (StoredJob(source, self.name, self.accuracy, self.layout) for source in sources)
        return first, second

    @property
    def _spec(self) -> BlockSpec:
        return BlockSpec(self.scheme.bits, self.scheme.block, self.scheme.symmetric, self.scheme.scale_type)

    def _specs(self) -> tuple[TensorSpec, ...]:
        n, k, bits, block = self.columns, self.rows, self.scheme.bits, self.scheme.block
        blocks, scale = -(-k // block), _SCALE[self.scheme.scale_type]
        if self.layout == "nbits":
            shapes: list[tuple[int, ...]] = [(n, blocks, block * bits // 8), (n, blocks), (n, -(-blocks * bits // 8))]
            kind = TensorProto.UINT8
        else:
            shapes = [(k, n), (blocks, n), (blocks, n)]
            if self.layout == "blocked_nk":
                shapes = [shape[::-1] for shape in shapes]
            kind = (_SIGNED if self.scheme.symmetric else _UNSIGNED)[bits]
        specs = [TensorSpec(shape, type_) for shape, type_ in zip(shapes, (kind, scale, kind), strict=True)]
        return tuple(specs[:2] if self.scheme.symmetric else specs)

    def tiles(self) -> Sequence[Tile]:
        """Return ranges of columns."""
        align = math.lcm(column_alignment(self._spec, Layout(self.layout), self.rows, self.columns), STRIP_COLUMNS)
        step = max(align, _TILE_BYTES * 8 // (self.rows * self.scheme.bits) // align * align)
        # A code takes a byte while it is moved, in three places at most.
        bytes_per_column = self.rows * (1 if self.layout == "nbits" else 4)
        return [
            Tile(a, min(a + step, self.columns), bytes_per_column * min(step, self.columns - a))
            for a in range(0, self.columns, step)
        ]

    def run(self, tile: Tile) -> TileOutput:
        """Copy a range of columns."""
        found = self.source.read(tile.start, tile.stop)
        arrays = self._arranged(found, tile.stop - tile.start)
        writes = [w for i, array in enumerate(arrays) for w in self._writes(i, array, tile)]
        return TileOutput(writes, {}, self.source.touched(tile.start, tile.stop))

    def finish(self, stats: list[dict[str, float]]) -> dict[str, Any]:
        """Say how the weight is coded; no error was made."""
        return {"bits": self.scheme.bits, "block": self.scheme.block}

    def _arranged(self, found: Columns, columns: int) -> list[Array]:
        parts = [found.codes, found.scales] + ([] if found.zero_points is None else [found.zero_points])
        if self.layout == "nbits":
            return parts
        held = TileBuffers(self._spec, Layout.NBITS, self.rows, columns, found.codes, found.scales, found.zero_points)
        codes, scales, zeros = unpack(held)
        block, blocks = self.scheme.block, scales.shape[0]
        whole = np.zeros((blocks * block, columns), np.uint8)
        whole[: self.rows] = codes
        made = TileBuffers.allocate(self._spec, Layout(self.layout), self.rows, columns)
        pack(whole.reshape(blocks, block, columns), scales, zeros, made, 0, self.rows)
        return [made.codes, made.scales] + ([] if made.zero_points is None else [made.zero_points])

    def _writes(self, index: int, array: Array, tile: Tile) -> list[tuple[int, int, Any]]:
        spec = self.outputs[index]
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if self.layout != "blocked_kn" or tile.stop - tile.start == self.columns:
            return [(index, spec.nbytes * tile.start // self.columns, flat)]
        rows = spec.shape[0]
        stride, width = spec.nbytes // rows, flat.size // rows
        first = stride * tile.start // self.columns
        return [(index, r * stride + first, flat[r * width : (r + 1) * width]) for r in range(rows)]


def widened(job: BlockJob) -> BlockJob | None:
    """Return the work of copying 3-bit codes as 4-bit ones; None where they are yet to be made, or of another width."""
    if job.scheme.bits != _NARROW:
        return None
    if isinstance(job, PackedBlockJob):
        parts = [part for part in map(widened, job.parts) if part is not None]
        return PackedBlockJob(parts) if len(parts) == len(job.parts) else None
    return (
        StoredJob(WidenedSource(job.source), job.name, job.accuracy, job.layout) if isinstance(job, StoredJob) else None
    )
