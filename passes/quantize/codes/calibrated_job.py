"""The recorded work of quantizing one weight with what its product's input looks like."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.concepts.block_weights import BlockLayout, WeightScheme
from onnxslim_llm.custom_ops.packing import pack
from onnxslim_llm.custom_ops.quantize import Layout, TileBuffers
from onnxslim_llm.ir.weights.jobs import Tile, TileOutput
from onnxslim_llm.ir.weights.weight import Weight
from onnxslim_llm.passes.quantize.codes.coding import best_codes, knowledge_of, nearest_codes, spec_of
from onnxslim_llm.passes.quantize.codes.compensate import Coded
from onnxslim_llm.passes.quantize.codes.job import QuantizeJob
from onnxslim_llm.passes.quantize.codes.planes import is_split, plane_of, plane_scheme
from onnxslim_llm.stats.curvature import output_error
from onnxslim_llm.stats.statistics import StoredMoments

__all__ = ["CalibratedJob", "PlaneJob"]

Array = NDArray[Any]

#: Part of the fingerprint: raise it when the same statistics give other bytes.
_VERSION = 5
#: Columns of a tile: enough for matrix products to be efficient, few enough for all threads to have some.
_TILE_COLUMNS = 512


class CodedJob(QuantizeJob):
    """Quantize a matrix, column by column, by codes that are chosen first and packed afterwards."""

    moments: StoredMoments | None
    ridge: float
    #: How codes are chosen, which is not how they are stored where that takes two planes.
    chosen_scheme: WeightScheme

    @property
    def _by_rows(self) -> bool:
        return False

    @property
    def _tile_columns(self) -> int:
        return _TILE_COLUMNS

    def choose(self, piece: Array) -> tuple[Coded, Array | None]:
        """Return codes for columns W[K, n], and their errors in the output where those are known."""
        if self.moments is None:
            return nearest_codes(piece, self.chosen_scheme), None
        return best_codes(piece, self.chosen_scheme, knowledge_of(self.moments, self.ridge))

    def _kept(self, coded: Coded) -> Coded:
        """Return the part of the codes that this job stores."""
        return coded

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
        block = self.chosen_scheme.block_rows(self.rows)
        best, errors = self.choose(piece)
        if errors is not None:
            assert self.moments is not None
            known = knowledge_of(self.moments, self.ridge)
            stats |= {
                "output_error": float(errors.sum()),
                "output_signal": float(output_error(piece, known.held).sum()),
            }
        stats |= {
            "sq_error": float(np.square(piece - best.dequantized(block), dtype=np.float64).sum()),
            "sq_weight": float(np.square(piece, dtype=np.float64).sum()),
        }
        arrays = self._stored(self._packed(self._kept(best), block))
        writes = [w for i, array in enumerate(arrays) for w in self._writes(i, array, tile)]
        line = self.rows * source.dtype.itemsize
        reads = [(0, tile.start * line, tile.stop * line)] if self.k_axis == 1 else None
        return TileOutput(writes, stats, reads)

    def _packed(self, coded: Coded, block: int) -> TileBuffers:
        columns = coded.codes.shape[1]
        buffers = TileBuffers.allocate(spec_of(self.scheme), Layout(self.layout), self.rows, columns)
        padded = np.zeros((len(coded.scales) * block, columns), np.uint8)
        padded[: self.rows] = coded.codes
        codes = padded.reshape(len(coded.scales), block, columns)
        pack(codes, coded.scales, coded.zeros, buffers, 0, self.rows)
        return buffers

    def finish(self, stats: list[dict[str, float]]) -> dict[str, Any]:
        """Sum the errors.

        Raises:
            ModelError: The weight holds NaN or infinite values.
        """
        total = super().finish(stats)
        if "output_signal" in total:
            signal = total["output_signal"]
            total["relative_output_error"] = math.sqrt(total["output_error"] / signal) if signal else 0.0
        return {**total, "bits": self.chosen_scheme.bits}


class CalibratedJob(CodedJob):
    """Quantize a matrix, each column in the best of several ways; see `coding.best_codes`.

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
        self.chosen_scheme = scheme
        self.fingerprint = f"calibrated v{_VERSION} {moments.digest} ridge={ridge!r} {self.fingerprint}"

    def with_layout(self, layout: BlockLayout) -> CalibratedJob:
        """Return the same work with its result in another layout."""
        assert self.moments is not None
        return CalibratedJob(self.inputs[0], self.k_axis, self.scheme, self.name, self.moments, layout, self.ridge)


class PlaneJob(CodedJob):
    """Choose codes of 5 or 6 bits for a matrix, and store the high or the low bits of them; see `planes`.

    Args:
        source: As in `QuantizeJob`, and so are `k_axis`, `name` and `layout`.
        scheme: With 5 or 6 bits.
        index: 0 for the high bits, 1 for the low ones.
        moments: Of the input of the product; None chooses without data.
        ridge: As in `CalibratedJob`.
    """

    def __init__(
        self,
        source: Weight,
        k_axis: int,
        scheme: WeightScheme,
        name: str,
        index: int,
        moments: StoredMoments | None,
        layout: BlockLayout = "blocked_kn",
        ridge: float = 0.0,
    ) -> None:
        assert is_split(scheme), name
        super().__init__(source, k_axis, plane_scheme(scheme, index), name, layout)
        self.moments, self.ridge, self.index = moments, ridge, index
        self.chosen_scheme = scheme
        digest = moments.digest if moments is not None else ""
        plane = f"plane {index} of {scheme} v{_VERSION} {digest} ridge={ridge!r}"
        self.fingerprint = f"{plane} {self.fingerprint}"

    def with_layout(self, layout: BlockLayout) -> PlaneJob:
        """Return the same work with its result in another layout."""
        return PlaneJob(
            *(self.inputs[0], self.k_axis, self.chosen_scheme, self.name, self.index),
            *(self.moments, layout, self.ridge),
        )

    def preview(self, start: int, stop: int) -> None:
        """Return nothing: the source is the sum of both planes."""
        return

    def _kept(self, coded: Coded) -> Coded:
        return plane_of(coded, self.chosen_scheme.bits, self.index)
