"""The recorded work of writing a few-bit weight as the product kernels read it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from onnxslim_llm.concepts.block_weights import BlockJob
from onnxslim_llm.custom_ops import available, kernels, packed
from onnxslim_llm.custom_ops.packed import HEADER_BYTES, STRIP_COLUMNS, PackedScheme
from onnxslim_llm.ir.weights.jobs import TensorSpec, Tile, TileOutput, WeightJob

__all__ = ["PackJob"]

Array = NDArray[Any]

#: Part of the fingerprint: raise it when the same parameters give other bytes.
_VERSION = 1
_STATS_SEPARATOR = ":"


class PackJob(WeightJob):
    """Write a weight in the packed layout: the same codes, scales and zero points in another order.

    Its one output is uint8 [bytes], see `custom_ops.packed`.

    Args:
        *halves: The work that makes the weight; or two of the same shape and scheme, a gate and what it multiplies,
            whose columns are then stored in turn.

    Raises:
        ValueError: The two do not fit together.
    """

    def __init__(self, *halves: BlockJob) -> None:
        self.halves = tuple(half.with_layout("nbits") for half in halves)
        first = self.halves[0]
        for half in self.halves[1:]:
            if (half.scheme, half.rows, half.columns) != (first.scheme, first.rows, first.columns):
                raise ValueError(f"'{half.where()}' is not coded like '{first.where()}'")
        self.inputs = tuple(weight for half in self.halves for weight in half.inputs)
        self.packed_scheme = self._scheme_of(first.columns)
        self.outputs = (TensorSpec((self.packed_scheme.size,), TensorProto.UINT8),)
        parts = " | ".join(half.fingerprint for half in self.halves)
        self.fingerprint = f"pack v{_VERSION} layout v{packed.VERSION}: {parts}"

    def _scheme_of(self, columns: int) -> PackedScheme:
        """Return the scheme of so many columns of each half."""
        first = self.halves[0]
        scheme = first.scheme
        return PackedScheme(
            rows=first.rows,
            columns=columns * len(self.halves),
            bits=scheme.bits,
            block=first.stored_block,
            symmetric=scheme.symmetric,
            scale_dtype=scheme.scale_type,
            paired=len(self.halves) == 2,
        )

    def where(self) -> str:
        """Return the name of the weight."""
        return " + ".join(half.where() for half in self.halves)

    @cached_property
    def _tiles(self) -> list[Tile]:
        """Tiles of the halves, put together until they end with a whole strip, both at the same column."""
        queues = [list(half.tiles()) for half in self.halves]
        tiles: list[Tile] = []
        start = 0
        while any(queues):
            taken: list[list[Tile]] = [[] for _ in queues]
            ends = [start] * len(queues)
            while True:
                slowest = ends.index(min(ends))
                tile = queues[slowest].pop(0)
                taken[slowest].append(tile)
                ends[slowest] = self.halves[slowest].columns_of(tile)[1]
                whole = ends[0] % STRIP_COLUMNS == 0 or not queues[0]
                if whole and len(set(ends)) == 1:
                    break
            made = self._scheme_of(ends[0] - start).size
            tiles.append(Tile(start, ends[0], sum(t.nbytes for part in taken for t in part) + 2 * made, taken))
            start = ends[0]
        return tiles

    def tiles(self) -> Sequence[Tile]:
        """Return ranges of columns, whole strips each."""
        return self._tiles

    def run(self, tile: Tile) -> TileOutput:
        """Make a range of columns and pack it."""
        stats: dict[str, float] = {}
        reads: list[tuple[int, int, int]] = []
        columns: list[list[Array]] = []
        before = 0
        for number, (half, parts) in enumerate(zip(self.halves, tile.extra, strict=True)):
            pieces: list[dict[int, list[Array]]] = []
            for place, part in enumerate(parts):
                found = half.run(part)
                pieces.append(_by_output(found))
                stats |= {f"{number}{_STATS_SEPARATOR}{place}{_STATS_SEPARATOR}{k}": v for k, v in found.stats.items()}
                if found.reads is None:
                    reads += [(before + i, 0, weight.nbytes) for i, weight in enumerate(half.inputs)]
                else:
                    reads += [(before + i, first, last) for i, first, last in found.reads]
            columns.append([_joined([a for p in pieces for a in p[i]]) for i in range(len(half.outputs))])
            before += len(half.inputs)
        arrays = [_joined([half[i] for half in columns]) for i in range(len(columns[0]))]
        return TileOutput(self._writes(tile, arrays), stats, reads)

    def _writes(self, tile: Tile, arrays: list[Array]) -> list[tuple[int, int, Any]]:
        scheme = self._scheme_of(tile.stop - tile.start)
        scales = arrays[1].view(scheme.scale_dtype)
        zeros = arrays[2] if len(arrays) > 2 else None
        blocks = -(-scheme.rows // scheme.block)
        shaped = (
            arrays[0].reshape(scheme.columns, blocks, -1),
            scales.reshape(scheme.columns, blocks),
            None if zeros is None else zeros.reshape(scheme.columns, -1),
        )
        piece = kernels.pack(scheme, *shaped) if available() else packed.pack(scheme, *shaped)
        strip_bytes = self.packed_scheme.payload_bytes // self.packed_scheme.strips
        at = HEADER_BYTES + tile.start // STRIP_COLUMNS * len(self.halves) * strip_bytes
        body = (0, at, piece[HEADER_BYTES:])
        return [(0, 0, packed.header(self.packed_scheme)), body] if tile.start == 0 else [body]

    def finish(self, stats: list[dict[str, float]]) -> dict[str, Any]:
        """Combine the figures as the work that makes the weight does.

        Raises:
            ModelError: From that work.
        """
        found = [half.finish(self._stats_of(number, stats)) for number, half in enumerate(self.halves)]
        if len(found) == 1:
            return found[0]
        return {"parts": {half.where(): figures for half, figures in zip(self.halves, found, strict=True)}}

    def _stats_of(self, number: int, stats: list[dict[str, float]]) -> list[dict[str, float]]:
        """Return the numbers of the tiles of one half, in their order."""
        result = []
        for tile, found in zip(self._tiles, stats, strict=True):
            for place in range(len(tile.extra[number])):
                prefix = f"{number}{_STATS_SEPARATOR}{place}{_STATS_SEPARATOR}"
                result.append({k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)})
        return result


def _joined(arrays: list[Array]) -> Array:
    """Return arrays one after the other; a single one as it is."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _by_output(output: TileOutput) -> dict[int, list[Array]]:
    """Return the bytes of each output in the order of their places."""
    found: dict[int, list[Array]] = {}
    for index, _, data in sorted(output.writes, key=lambda write: write[:2]):
        found.setdefault(index, []).append(np.frombuffer(data, np.uint8))
    return found
