"""The recorded work of quantizing one weight: tiles of columns through the compiled quantizer, at save."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from onnxslim_llm.concepts.block_weights import BlockJob, BlockLayout, WeightScheme
from onnxslim_llm.custom_ops import available
from onnxslim_llm.custom_ops.packing import pack_bits
from onnxslim_llm.custom_ops.quantize import BlockSpec, Layout, TileBuffers, column_alignment, quantize_tile
from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.weights import AliasWeight, DerivedWeight, ViewWeight
from onnxslim_llm.ir.weights.dtypes import bits_of
from onnxslim_llm.ir.weights.jobs import TensorSpec, Tile, TileOutput
from onnxslim_llm.ir.weights.weight import Weight

__all__ = ["TILE_BYTES", "QuantizeJob"]

#: Input bytes of a tile: small against the memory limit, large against the cost of starting one.
TILE_BYTES = 32 << 20
#: Without the compiled quantizer every step has temporaries of its own, in float32.
_TILE_BYTES_NUMPY = 2 << 20
#: Blocks after which every row of codes and zero points ends with a whole byte, whatever its width.
_WHOLE_BYTES = 4
_BYTE = 8
_COLUMNS_TOGETHER = 16
#: Larger results of other work are not computed only to look at some of their columns.
_PREVIEW_BYTES = 64 << 20
#: Part of the fingerprint: raise it when the same parameters give other bytes.
_VERSION = 1
#: Blocks that MatMulNBits has fast kernels for: a scale per column is repeated for each of them.
_FAST_BLOCKS = {2: (32, 64, 128), 3: (16, 32, 64, 128, 256), 4: (16, 32, 64, 128, 256), 8: (16, 32, 64, 128, 256)}

_SIGNED = {2: TensorProto.INT2, 3: TensorProto.INT4, 4: TensorProto.INT4, 8: TensorProto.INT8}
_UNSIGNED = {2: TensorProto.UINT2, 3: TensorProto.UINT4, 4: TensorProto.UINT4, 8: TensorProto.UINT8}
_SCALE = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


class QuantizeJob(BlockJob):
    """Quantize a matrix in blocks along K.

    Args:
        source: The weight, stored [K, N] or [N, K]; float32, float16 or bfloat16.
        k_axis: Which of the source's two axes is K.
        scheme: How to code it.
        name: Name of the weight, for messages.
        layout: Byte layout of the result.
    """

    def __init__(
        self, source: Weight, k_axis: int, scheme: WeightScheme, name: str, layout: BlockLayout = "blocked_kn"
    ) -> None:
        self.inputs = (source,)
        self.k_axis = k_axis
        self.scheme, self.accuracy = scheme, scheme.accuracy
        self.name = name
        self.layout: BlockLayout = layout
        self.rows, self.columns = source.shape[k_axis], source.shape[1 - k_axis]
        self.stored_block = scheme.block_rows(self.rows)
        if layout == "nbits" and not scheme.block:
            self.stored_block = _cheapest_block(self.rows, scheme.bits)
        self.outputs = self._specs()
        self.fingerprint = f"quantize v{_VERSION} {scheme} K={k_axis} {layout} stored={self.stored_block}"

    def with_layout(self, layout: BlockLayout) -> QuantizeJob:
        """Return the same work with its result in another layout."""
        return QuantizeJob(self.inputs[0], self.k_axis, self.scheme, self.name, layout)

    def where(self) -> str:
        """Return the name of the weight."""
        return self.name

    def preview(self, start: int, stop: int) -> NDArray[np.float32] | None:
        """Return columns of the source; None where it is the result of other work, and large."""
        source = self.inputs[0]
        if isinstance(_beneath(source), DerivedWeight) and source.nbytes > _PREVIEW_BYTES:
            return None
        matrix = source.view() if self.k_axis == 0 else source.view().T
        columns = np.array(matrix[:, start:stop], np.float32)
        source.release()
        return columns

    def _specs(self) -> tuple[TensorSpec, ...]:
        n, bits, scale_type = self.columns, self.scheme.bits, _SCALE[self.scheme.scale_type]
        blocks = -(-self.rows // self.stored_block)
        if self.layout == "nbits":
            code_shape: tuple[int, ...] = (n, blocks, _bytes(self.stored_block * bits))
            zero_shape: tuple[int, ...] = (n, _bytes(blocks * bits))
            scale_shape, kind = (n, blocks), TensorProto.UINT8
        else:
            by_column = self.layout == "blocked_nk"
            code_shape = (n, self.rows) if by_column else (self.rows, n)
            zero_shape = scale_shape = (n, blocks) if by_column else (blocks, n)
            kind = (_SIGNED if self.scheme.symmetric else _UNSIGNED)[bits]
        specs = (TensorSpec(code_shape, kind), TensorSpec(scale_shape, scale_type))
        return specs if self.scheme.symmetric else (*specs, TensorSpec(zero_shape, kind))

    @cached_property
    def _spec(self) -> BlockSpec:
        scheme = self.scheme
        return BlockSpec(scheme.bits, scheme.block or -1, scheme.symmetric, scheme.scale_type)

    @property
    def _by_rows(self) -> bool:
        """Whether tiles are ranges of rows: where both the source and the result lie row by row."""
        return self.layout == "blocked_kn" and self.k_axis == 0 and self.scheme.block > 0

    @property
    def _tile_columns(self) -> int:
        """Columns of a tile where time, not memory, decides; 0 where it does not."""
        return 0

    def tiles(self) -> Sequence[Tile]:
        """Return ranges of rows or of columns."""
        if self._by_rows:
            line, count, align = self.columns, self.rows, _WHOLE_BYTES * self.scheme.block
        else:
            align = column_alignment(self._spec, Layout(self.layout), self.rows, self.columns)
            if self.layout == "nbits":  # what is made of these columns may store so many of them together
                align = _COLUMNS_TOGETHER
            line, count = self.rows, self.columns
        size = line * self.inputs[0].dtype.itemsize
        limit = self._tile_columns * size if self._tile_columns else TILE_BYTES if available() else _TILE_BYTES_NUMPY
        step = max(align, limit // size // align * align)
        # Input pages, and the codes and scales, which are at most as large.
        return [Tile(a, min(a + step, count), 2 * size * min(step, count - a)) for a in range(0, count, step)]

    def run(self, tile: Tile) -> TileOutput:
        """Quantize a range of rows or columns."""
        source = self.inputs[0].view()
        matrix = source if self.k_axis == 0 else source.T
        part = slice(tile.start, tile.stop)
        piece = matrix[part] if self._by_rows else matrix[:, part]
        method = self.scheme.method
        assert method != "calibrated", self.name
        found = quantize_tile(piece, self._spec, method, None, Layout(self.layout))
        stats = {"sq_error": found.sq_error, "sq_weight": found.sq_weight, "nonfinite": float(found.nonfinite)}
        if found.first_nonfinite is not None:
            stats["first_nonfinite"] = self._first_nonfinite(piece, tile)
        arrays = self._stored(found.buffers)
        writes = [w for i, array in enumerate(arrays) for w in self._writes(i, array, tile)]
        contiguous = self._by_rows or self.k_axis == 1
        line = (self.columns if self._by_rows else self.rows) * source.dtype.itemsize
        reads = [(0, tile.start * line, tile.stop * line)] if contiguous else None
        return TileOutput(writes, stats, reads)

    def _first_nonfinite(self, piece: np.ndarray[Any, Any], tile: Tile) -> float:
        """Return the position in the source, as it is stored, of the first NaN or infinite value of a tile."""
        k, n = np.nonzero(~np.isfinite(piece.astype(np.float32)))
        k, n = (k + tile.start, n) if self._by_rows else (k, n + tile.start)
        return float((k * self.columns + n if self.k_axis == 0 else n * self.rows + k).min())

    def finish(self, stats: list[dict[str, float]]) -> dict[str, Any]:
        """Sum the errors.

        Raises:
            ModelError: The weight holds NaN or infinite values.
        """
        firsts = [tile["first_nonfinite"] for tile in stats if "first_nonfinite" in tile]
        total = super().finish([{k: v for k, v in tile.items() if k != "first_nonfinite"} for tile in stats])
        if total["nonfinite"]:
            at = [int(i) for i in np.unravel_index(int(min(firsts)), self.inputs[0].shape)]
            raise ModelError(
                f"the weight has {int(total['nonfinite'])} NaN or infinite values, the first at {at}",
                where=f"tensor '{self.name}'",
                todo="export the model again, or leave this weight alone with quantize_weights.exclude",
            )
        total["relative_error"] = math.sqrt(total["sq_error"] / total["sq_weight"]) if total["sq_weight"] else 0.0
        return {**total, "bits": self.scheme.bits, "block": self.scheme.block}

    def _stored(self, buffers: TileBuffers) -> list[np.ndarray[Any, Any]]:
        arrays = [buffers.codes, buffers.scales]
        if buffers.zero_points is not None:
            arrays.append(buffers.zero_points)
        if self.layout == "nbits" and not self.scheme.block:
            arrays = self._split_columns(*arrays)
        return arrays

    def _split_columns(
        self, codes: np.ndarray[Any, Any], scales: np.ndarray[Any, Any], zeros: np.ndarray[Any, Any] | None = None
    ) -> list[np.ndarray[Any, Any]]:
        """Cut blocks of a whole column into stored blocks that repeat its scale and zero point."""
        bits, n = self.scheme.bits, codes.shape[0]
        blocks = -(-self.rows // self.stored_block)
        zero = np.full(n, 1 << bits - 1, np.uint8) if zeros is None else zeros[:, 0] & ((1 << bits) - 1)
        filler = pack_bits(
            np.repeat(zero[:, None], _BYTE, axis=1), bits
        )  # 8 codes fill whole bytes, whatever their width
        wide = np.tile(filler, (1, blocks * self.stored_block // _BYTE))
        codes = codes.reshape(n, -1)
        whole, rest = divmod(self.rows * bits, 8)
        wide[:, :whole] = codes[:, :whole]
        if rest:
            low = np.uint8((1 << rest) - 1)
            wide[:, whole] = (codes[:, whole] & low) | (wide[:, whole] & ~low)
        result = [wide, np.repeat(scales, blocks, axis=1)]
        if zeros is not None:
            result.append(pack_bits(np.repeat(zero[:, None], blocks, axis=1), bits))
        return result

    def _writes(self, index: int, array: np.ndarray[Any, Any], tile: Tile) -> list[tuple[int, int, Any]]:
        spec = self.outputs[index]
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if self._by_rows:
            lines = tile.start if index == 0 else tile.start // self.scheme.block
            return [(index, lines * self.columns * bits_of(spec.onnx_dtype) // _BYTE, flat)]
        if self.layout != "blocked_kn":
            return [(index, spec.nbytes * tile.start // self.columns, flat)]
        if tile.stop - tile.start == self.columns:
            return [(index, 0, flat)]
        rows = spec.shape[0]
        stride, width = spec.nbytes // rows, flat.size // rows
        first = stride * tile.start // self.columns
        return [(index, r * stride + first, flat[r * width : (r + 1) * width]) for r in range(rows)]


def _cheapest_block(rows: int, bits: int) -> int:
    """Return the block with which a column takes the fewest bytes: long ones save scales, short ones padding."""
    return min(_FAST_BLOCKS[bits], key=lambda block: -(-rows // block) * (block * bits // 8 + 4))


def _beneath(weight: Weight) -> Weight:
    """Return what a weight only shows differently."""
    while isinstance(weight, ViewWeight | AliasWeight):
        weight = weight.base
    return weight


def _bytes(bits: int) -> int:
    return -(-bits // 8)
