"""The recorded work of writing a weight as entries of tables."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.weights.jobs import TensorSpec, Tile, TileOutput, WeightJob
from onnxslim_llm.ir.weights.weight import Weight
from onnxslim_llm.passes.quantize.codebook.assign import decoded
from onnxslim_llm.passes.quantize.codebook.fit import best_codes, make_books
from onnxslim_llm.passes.quantize.codebook.form import BookForm
from onnxslim_llm.passes.quantize.codes.coding import InputKnowledge, knowledge_of
from onnxslim_llm.stats.curvature import output_error
from onnxslim_llm.stats.statistics import StoredMoments

__all__ = ["CodebookJob"]

Array = NDArray[Any]

#: Part of the fingerprint: raise it when the same input gives other bytes.
_VERSION = 2
_TILE_COLUMNS = 512
#: Columns that tables are made from, evenly spread.
_BOOK_COLUMNS = 1024
_ENTRIES = 256


class CodebookJob(WeightJob):
    """Code W[K, N] by tables.

    Its outputs are codes [N, K / d] uint8, one for each stage, scales [N, KB, 1] float16, and tables [256, d] float16,
    one for each stage.

    Args:
        source: The weight, stored [K, N] or [N, K].
        k_axis: Which of the source's two axes is K.
        form: How it is coded; d divides the block, and the block K.
        name: Name of the weight, for messages.
        moments: Of the input of the product; None codes by the weight alone.
    """

    def __init__(
        self, source: Weight, k_axis: int, form: BookForm, name: str, moments: StoredMoments | None = None
    ) -> None:
        self.inputs = (source,)
        self.k_axis, self.form, self.name, self.moments = k_axis, form, name, moments
        self.rows, self.columns = source.shape[k_axis], source.shape[1 - k_axis]
        codes = TensorSpec((self.columns, self.rows // form.length), TensorProto.UINT8)
        scales = TensorSpec((self.columns, self.rows // form.block, 1), TensorProto.FLOAT16)
        table = TensorSpec((_ENTRIES, form.length), TensorProto.FLOAT16)
        self.outputs = (*[codes] * form.stages, scales, *[table] * form.stages)
        digest = moments.digest if moments is not None else ""
        self.fingerprint = f"codebook v{_VERSION} {form} K={k_axis} {digest}"
        self._lock = threading.Lock()
        self._books: Array | None = None

    def where(self) -> str:
        """Return the name of the weight."""
        return self.name

    def tiles(self) -> Sequence[Tile]:
        """Return ranges of columns."""
        step = _TILE_COLUMNS
        # Weights in float32, the same with errors passed on, codes of three ways and their values; H and its factor.
        column, shared = 4 * 6 * self.rows, 3 * 4 * self.rows * self.rows if self.moments is not None else 0
        ranges = [(a, min(a + step, self.columns)) for a in range(0, self.columns, step)]
        return [Tile(a, b, column * (b - a) + shared) for a, b in ranges]

    def run(self, tile: Tile) -> TileOutput:
        """Code some columns; the first tile makes the tables."""
        piece = self._piece(np.arange(tile.start, tile.stop))
        known = knowledge_of(self.moments) if self.moments is not None else None
        bad = ~np.isfinite(piece)
        stats = {"nonfinite": float(bad.sum())}
        piece[bad] = 0
        books = self._tables(known)
        codes, scales = best_codes(piece, self.form, books, known)
        error = piece - decoded(codes, scales, books)
        stats |= {
            "sq_error": float(np.square(error, dtype=np.float64).sum()),
            "sq_weight": float(np.square(piece, dtype=np.float64).sum()),
        }
        if known is not None:
            stats |= {
                "output_error": float(output_error(error, known.held).sum()),
                "output_signal": float(output_error(piece, known.held).sum()),
            }
        arrays = [*codes.transpose(0, 2, 1), scales.T.astype(np.float16)]
        writes: list[tuple[int, int, Any]] = [
            (i, tile.start * array.shape[1] * array.itemsize, _flat(array)) for i, array in enumerate(arrays)
        ]
        if tile.start == 0:
            stages = self.form.stages
            writes += [(stages + 1 + i, 0, _flat(book.astype(np.float16))) for i, book in enumerate(books)]
        return TileOutput(writes, stats)

    def finish(self, stats: list[dict[str, float]]) -> dict[str, Any]:
        """Sum the errors.

        Raises:
            ModelError: The weight holds NaN or infinite values.
        """
        total = super().finish(stats)
        if total["nonfinite"]:
            raise ModelError(
                f"the weight has {int(total['nonfinite'])} NaN or infinite values",
                where=f"tensor '{self.name}'",
                todo="export the model again, or leave this weight alone with quantize_codebook.exclude",
            )
        total["relative_error"] = math.sqrt(total["sq_error"] / total["sq_weight"]) if total["sq_weight"] else 0.0
        if total.get("output_signal"):
            total["relative_output_error"] = math.sqrt(total["output_error"] / total["output_signal"])
        return total

    def _piece(self, columns: NDArray[np.int64]) -> Array:
        source = self.inputs[0].view()
        matrix = source if self.k_axis == 0 else source.T
        return np.ascontiguousarray(matrix[:, columns], dtype=np.float32)

    def _tables(self, known: InputKnowledge | None) -> Array:
        with self._lock:
            if self._books is None:
                count = min(self.columns, _BOOK_COLUMNS)
                piece = self._piece(np.unique(np.linspace(0, self.columns - 1, count).round().astype(np.int64)))
                piece[~np.isfinite(piece)] = 0
                self._books = make_books(piece, self.form, known.importance if known is not None else None)
            return self._books


def _flat(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
