"""The recorded work of quantizing one weight with what its product's input looks like."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.concepts.block_weights import BlockLayout, WeightScheme
from onnxslim_llm.custom_ops.packing import pack, unpack
from onnxslim_llm.custom_ops.quantize import Layout, TileBuffers, quantize_tile
from onnxslim_llm.ir.weights.jobs import Tile, TileOutput
from onnxslim_llm.ir.weights.weight import Weight
from onnxslim_llm.passes.quantize.compensate import Coded, Grid, compensate
from onnxslim_llm.passes.quantize.job import QuantizeJob
from onnxslim_llm.stats.curvature import inverse_factor, output_error
from onnxslim_llm.stats.statistics import StoredMoments

__all__ = ["CalibratedJob"]

Array = NDArray[Any]

#: Part of the fingerprint: raise it when the same statistics give other bytes.
_VERSION = 1
#: Columns of a tile: enough for matrix products to be efficient, few enough for all threads to have some.
_TILE_COLUMNS = 512
_KEPT = 2  # statistics of so many inputs are held at a time


class CalibratedJob(QuantizeJob):
    """Quantize a matrix, column by column in the best of several ways.

    Tried are the scale search without data, the search with errors weighted by the mean square of each input channel,
    and the second with compensation of errors. What makes the least error in the *output* of the product, on samples
    that were held out, is kept; so no column is worse on them than without data.

    Args:
        source: As in `QuantizeJob`, and so are `k_axis`, `scheme`, `name` and `layout`.
        moments: Of the input of the product.
        ridge: Added to the diagonal of the mean of H: what errors cost beside the product, in a table of look-ups.
    """

    def __init__(
        self,
        source: Weight,
        k_axis: int,
        scheme: WeightScheme,
        name: str,
        moments: StoredMoments,
        layout: BlockLayout = "blocked_kn",
        ridge: float = 0.0,
    ) -> None:
        super().__init__(source, k_axis, scheme, name, layout)
        self.moments = moments
        self.ridge = ridge
        self.fingerprint = f"calibrated v{_VERSION} {moments.digest} ridge={ridge!r} {self.fingerprint}"

    def with_layout(self, layout: BlockLayout) -> CalibratedJob:
        """Return the same work with its result in another layout."""
        return CalibratedJob(self.inputs[0], self.k_axis, self.scheme, self.name, self.moments, layout, self.ridge)

    @property
    def _by_rows(self) -> bool:
        return False

    @property
    def _tile_columns(self) -> int:
        return _TILE_COLUMNS

    def run(self, tile: Tile) -> TileOutput:
        """Quantize a range of columns."""
        source = self.inputs[0].view()
        matrix = source if self.k_axis == 0 else source.T
        piece = np.ascontiguousarray(matrix[:, tile.start : tile.stop], dtype=np.float32)
        bad = ~np.isfinite(piece)
        stats = {"nonfinite": float(bad.sum())}
        if bad.any():
            stats["first_nonfinite"] = self._first_nonfinite(piece, tile)
            piece[bad] = 0
        prepared = _PREPARED.of(self.moments, self.ridge)
        best, errors = self._best(piece, prepared)
        buffers = TileBuffers.allocate(self._spec, Layout(self.layout), *piece.shape)
        block = self._spec.block_rows(self.rows)
        padded = np.zeros((len(best.scales) * block, piece.shape[1]), np.uint8)
        padded[: self.rows] = best.codes
        codes = padded.reshape(len(best.scales), block, -1)
        pack(codes, best.scales, best.zeros, buffers, 0, self.rows)
        difference = piece - best.dequantized(block)
        stats |= {
            "sq_error": float(np.square(difference, dtype=np.float64).sum()),
            "sq_weight": float(np.square(piece, dtype=np.float64).sum()),
            "output_error": float(errors.sum()),
            "output_signal": float(output_error(piece, prepared.held).sum()),
        }
        writes = [w for i, array in enumerate(self._stored(buffers)) for w in self._writes(i, array, tile)]
        line = self.rows * source.dtype.itemsize
        reads = [(0, tile.start * line, tile.stop * line)] if self.k_axis == 1 else None
        return TileOutput(writes, stats, reads)

    def finish(self, stats: list[dict[str, float]]) -> dict[str, Any]:
        """Sum the errors.

        Raises:
            ModelError: The weight holds NaN or infinite values.
        """
        total = super().finish(stats)
        signal = total.get("output_signal", 0.0)
        total["relative_output_error"] = math.sqrt(total["output_error"] / signal) if signal else 0.0
        return total

    def _best(self, piece: Array, prepared: _Prepared) -> tuple[Coded, Array]:
        """Return the best way for each column, and its output error on the samples that were held out."""
        weight = prepared.importance
        candidates = [self._searched(piece, None), self._searched(piece, weight)]
        if prepared.factor is not None:
            candidates.append(self._compensated(piece, prepared.factor, weight))
        block = self._spec.block_rows(self.rows)
        errors = np.stack([output_error(piece - c.dequantized(block), prepared.held) for c in candidates])
        winner = errors.argmin(axis=0)
        chosen = Coded(
            *(_pick(winner, [getattr(c, part) for c in candidates]) for part in ("codes", "scales", "zeros"))
        )
        return chosen, errors.min(axis=0)

    def _searched(self, piece: Array, importance: Array | None) -> Coded:
        found = quantize_tile(piece, self._spec, "search", importance, Layout.NBITS)
        return Coded(*unpack(found.buffers))

    def _compensated(self, piece: Array, factor: Array, importance: Array) -> Coded:
        whole = replace(self._spec, block=-1)

        def fit(rows: Array, start: int) -> Grid:
            part = importance[start : start + len(rows)]
            buffers = quantize_tile(np.ascontiguousarray(rows), whole, "search", part, Layout.NBITS).buffers
            _, scales, zeros = unpack(buffers)
            return Grid(scales[0], zeros[0])

        return compensate(piece, factor, self._spec.block_rows(self.rows), 2**self.scheme.bits - 1, fit)


def _pick(winner: Array, arrays: list[Array]) -> Array:
    result = arrays[0].copy()
    for i, array in enumerate(arrays[1:], 1):
        result[:, winner == i] = array[:, winner == i]
    return result


@dataclass(frozen=True)
class _Prepared:
    """What jobs need of an input's moments.

    Attributes:
        importance: Mean square of each channel [K], float32.
        factor: See `inverse_factor`; None if there is none.
        held: H of the samples that were held out, float32.
    """

    importance: Array
    factor: Array | None
    held: Array


class _Cache:
    """The last few prepared statistics, made once for all tiles and threads."""

    def __init__(self) -> None:
        self._made: OrderedDict[tuple[Path, str, float], _Prepared] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, moments: StoredMoments, ridge: float) -> _Prepared:
        key = (moments.file, moments.digest, ridge)
        with self._lock:
            if key not in self._made:
                self._made[key] = _prepare(moments, ridge)
                while len(self._made) > _KEPT:
                    self._made.popitem(last=False)
            self._made.move_to_end(key)
            return self._made[key]


def _prepare(moments: StoredMoments, ridge: float) -> _Prepared:
    collected = moments.load()
    grams = []
    for part in (collected.fit, collected.held):
        assert part.gram is not None, moments.file
        grams.append(part.gram + ridge * part.count * np.eye(part.size))
    importance = (collected.fit.mean_square + ridge).astype(np.float32)
    return _Prepared(importance, inverse_factor(grams[0]), grams[1].astype(np.float32))


_PREPARED = _Cache()
