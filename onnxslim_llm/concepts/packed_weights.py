"""Block-quantized weights side by side: one product instead of several, with the same numbers.

Scales belong to columns, so that the codes of [W1 W2] are those of W1 and W2: each part is quantized as it would be
alone, and only the place where its bytes go is different.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from onnxslim_llm.concepts.block_weights import BlockJob, BlockLayout
from onnxslim_llm.ir.weights.jobs import TensorSpec, Tile, TileOutput

__all__ = ["COLUMNS_TOGETHER", "PackedBlockJob"]

#: Columns that a layout may store together: the parts must not share such a group.
COLUMNS_TOGETHER = 16


class PackedBlockJob(BlockJob):
    """Quantize weights W1[K, N1], W2[K, N2], ... into one weight [K, N1 + N2 + ...].

    Args:
        parts: The work for each of them: with one scheme, K and layout, and columns in multiples of 16.

    Raises:
        ValueError: They do not fit together.
    """

    def __init__(self, parts: Sequence[BlockJob]) -> None:
        first = parts[0]
        for part in parts:
            if _form(part) != _form(first):
                raise ValueError(f"'{part.where()}' is not coded like '{first.where()}'")
            if part.columns % COLUMNS_TOGETHER:
                raise ValueError(f"'{part.where()}' has {part.columns} columns, no multiple of {COLUMNS_TOGETHER}")
        self.parts = tuple(parts)
        self.inputs = tuple(weight for part in parts for weight in part.inputs)
        self.scheme, self.rows, self.layout = first.scheme, first.rows, first.layout
        self.stored_block, self.accuracy = first.stored_block, first.accuracy
        self.columns = sum(part.columns for part in parts)
        self.outputs = tuple(self._spec(index) for index in range(len(first.outputs)))
        self.fingerprint = "packed: " + " | ".join(part.fingerprint for part in parts)

    def with_layout(self, layout: BlockLayout) -> PackedBlockJob:
        """Return the same work with its result in another layout."""
        return PackedBlockJob([part.with_layout(layout) for part in self.parts])

    @property
    def pieces(self) -> tuple[BlockJob, ...]:
        """Those of all parts."""
        return tuple(piece for part in self.parts for piece in part.pieces)

    def where(self) -> str:
        """Return the names of the weights."""
        return " + ".join(part.where() for part in self.parts)

    def _spec(self, index: int) -> TensorSpec:
        specs = [part.outputs[index] for part in self.parts]
        shape = list(specs[0].shape)
        shape[self._axis] = sum(spec.shape[self._axis] for spec in specs)
        return TensorSpec(tuple(shape), specs[0].onnx_dtype)

    @property
    def _axis(self) -> int:
        """The axis of all outputs that columns run along."""
        return 1 if self.layout == "blocked_kn" else 0

    @cached_property
    def _tiles(self) -> list[Tile]:
        return [
            Tile(tile.start, tile.stop, tile.nbytes, extra=(number, tile))
            for number, part in enumerate(self.parts)
            for tile in part.tiles()
        ]

    def tiles(self) -> Sequence[Tile]:
        """Return the tiles of all parts."""
        return self._tiles

    def columns_of(self, tile: Tile) -> tuple[int, int]:
        """Return the range of columns that a tile computes, where the layout is "nbits"."""
        number, inner = tile.extra
        before = sum(part.columns for part in self.parts[:number])
        first, last = self.parts[number].columns_of(inner)
        return before + first, before + last

    def run(self, tile: Tile) -> TileOutput:
        """Run a tile of a part, and say where its bytes are in the whole."""
        number, inner = tile.extra
        part = self.parts[number]
        found = part.run(inner)
        writes = [w for index, offset, data in found.writes for w in self._moved(number, index, offset, data)]
        before = sum(len(earlier.inputs) for earlier in self.parts[:number])
        if found.reads is None:
            reads = [(before + i, 0, weight.nbytes) for i, weight in enumerate(part.inputs)]
        else:
            reads = [(before + i, start, stop) for i, start, stop in found.reads]
        return TileOutput(writes, found.stats, reads)

    def _moved(self, number: int, index: int, offset: int, data: Any) -> Iterator[tuple[int, int, Any]]:
        own, whole = self.parts[number].outputs[index], self.outputs[index]
        before = sum(part.outputs[index].nbytes for part in self.parts[:number])
        if self._axis == 0:
            yield index, before + offset, data
            return
        lines = own.shape[0]
        width, stride, before = own.nbytes // lines, whole.nbytes // lines, before // lines
        content = memoryview(data).cast("B")
        done = 0
        while done < len(content):
            line, column = divmod(offset + done, width)
            count = min(width - column, len(content) - done)
            yield index, line * stride + before + column, content[done : done + count]
            done += count

    def finish(self, stats: list[dict[str, float]]) -> dict[str, Any]:
        """Combine the figures: of the whole, and under "parts" those of each weight by its name.

        Raises:
            ModelError: From a part.
        """
        parts: dict[str, Any] = {}
        for number, part in enumerate(self.parts):
            own = [found for found, tile in zip(stats, self._tiles, strict=True) if tile.extra[0] == number]
            parts[part.where()] = part.finish(own)
        total = super().finish(stats)
        return {**total, "bits": self.scheme.bits, "block": self.scheme.block, "parts": parts}


def _form(job: BlockJob) -> tuple[Any, ...]:
    """Equal for work whose results fit side by side."""
    return (job.scheme, job.rows, job.layout, job.stored_block, job.accuracy)
