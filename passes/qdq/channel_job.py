"""The recorded work of storing a weight as integers with a scale per output channel, or one for the whole tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.weights import Weight, dtypes
from onnxslim_llm.ir.weights.jobs import TensorSpec, Tile, TileOutput, WeightJob
from onnxslim_llm.stats.grid import Grid, grid_of
from onnxslim_llm.targets.qdq_rules import WeightType

__all__ = ["ChannelJob"]

Array = NDArray[Any]

#: Input bytes of a tile.
_TILE_BYTES = 32 << 20
#: Temporaries of a tile, in float32 copies of it.
_COPIES = 4
#: Below 8 bits the largest weight of a channel costs the others too much: shorter ranges are tried, down to a half.
_SHRINK_BELOW = 8
_FACTORS = 2.0 ** (-np.arange(9) / 8)
#: Part of the fingerprint: raise it when the same parameters give other bytes.
_VERSION = 1
_TINY = np.finfo(np.float32).tiny


class ChannelJob(WeightJob):
    """Code a weight of any rank: outputs are codes in the source's shape, scales, and zero points if they are not 0.

    Args:
        source: The weight, as the node reads it; float32, float16, bfloat16.
        axis: Of the output channels; None for one scale.
        kind: Element type of the codes.
        symmetric: The zero point is the middle of the codes.
        scale_type: Element type of the scales (`TensorProto.DataType`).
        name: Name of the weight, for messages.
        least_scale: Scales are at least this [channels], so that a bias in units of them fits into int32.
    """

    def __init__(
        self,
        source: Weight,
        axis: int | None,
        kind: WeightType,
        symmetric: bool,
        scale_type: int,
        name: str,
        least_scale: Array | None = None,
    ) -> None:
        self.inputs = (source,)
        self.axis = axis
        self.kind = kind
        self.grid = grid_of(kind, symmetric)
        self.name = name
        self.least_scale = least_scale
        codes = int(getattr(TensorProto, kind.upper()))
        scales: tuple[int, ...] = () if axis is None else (source.shape[axis],)
        self.has_zeros = not (symmetric and not kind.startswith("u"))
        specs = (TensorSpec(source.shape, codes), TensorSpec(scales, scale_type))
        self.outputs = (*specs, TensorSpec(scales, codes)) if self.has_zeros else specs
        least = "" if least_scale is None else hashlib.sha256(np.asarray(least_scale, "<f4").tobytes()).hexdigest()
        self.fingerprint = f"channels v{_VERSION} axis={axis} {kind} symmetric={symmetric} {scale_type} {least}"

    def where(self) -> str:
        """Return the name of the weight."""
        return self.name

    def tiles(self) -> Sequence[Tile]:
        """Return ranges of channels, where the codes of a range are whole bytes in rows or on their own."""
        source = self.inputs[0]
        count = 1 if self.axis is None else source.shape[self.axis]
        whole_bytes = dtypes.bits_of(self.outputs[0].onnx_dtype) == 8
        divisible = self.axis == 0 or (len(source.shape) == 2 and self.axis == 1)
        line = source.size // max(count, 1) * source.dtype.itemsize
        step = max(1, _TILE_BYTES // max(line, 1)) if whole_bytes and divisible else count
        return [
            Tile(start, min(start + step, count), _COPIES * line * min(step, count - start))
            for start in range(0, count, step)
        ]

    def run(self, tile: Tile) -> TileOutput:
        """Code a range of channels."""
        source = self.inputs[0].view()
        part = source if self.axis is None else source[(slice(None),) * self.axis + (slice(tile.start, tile.stop),)]
        values = part.astype(np.float32)
        by_channel = values[None] if self.axis is None else np.moveaxis(values, self.axis, 0)
        rows = by_channel.reshape(tile.stop - tile.start, -1)
        if not np.isfinite(rows).all():
            raise ModelError(
                "the weight has NaN or infinite values",
                where=f"tensor '{self.name}'",
                todo="export the model again, or leave this node alone with quantize_activations.exclude",
            )
        scales, zeros = self._parameters(rows, tile)
        if self.outputs[1].onnx_dtype == TensorProto.FLOAT16:
            scales = np.maximum(scales.astype(np.float16), np.finfo(np.float16).smallest_subnormal).astype(np.float32)
        codes = np.clip(np.rint(rows / scales[:, None]) + zeros[:, None], self.grid.lowest, self.grid.highest)
        error = ((codes - zeros[:, None]) * scales[:, None] - rows).astype(np.float64)
        stats = {"sq_error": float(np.sum(error**2)), "sq_weight": float(np.sum(rows.astype(np.float64) ** 2))}
        if self.axis is None:
            shaped = codes.reshape(source.shape)
        else:
            shaped = np.moveaxis(codes.reshape(by_channel.shape), 0, self.axis)
        return TileOutput(self._writes(shaped, scales, zeros, tile), stats)

    def _parameters(self, rows: Array, tile: Tile) -> tuple[Array, Array]:
        low, high = np.minimum(rows.min(axis=1), 0.0), np.maximum(rows.max(axis=1), 0.0)
        factors = _FACTORS if dtypes.bits_of(self.outputs[0].onnx_dtype) < _SHRINK_BELOW else _FACTORS[:1]
        best_error = np.full(len(rows), np.inf)
        scales, zeros = np.ones(len(rows), np.float32), np.zeros(len(rows), np.float32)
        for factor in factors:
            tried, shift = _scales(self.grid, low * factor, high * factor)
            if self.least_scale is not None:
                tried = np.maximum(tried, self.least_scale[tile.start : tile.stop].astype(np.float32))
            error = _errors(self.grid, rows, tried, shift) if len(factors) > 1 else np.zeros(len(rows))
            better = error < best_error
            best_error = np.where(better, error, best_error)
            scales, zeros = np.where(better, tried, scales), np.where(better, shift, zeros)
        return scales, zeros

    def _writes(self, codes: Array, scales: Array, zeros: Array, tile: Tile) -> list[tuple[int, int, Any]]:
        kind, scale_type = self.outputs[0].onnx_dtype, self.outputs[1].onnx_dtype
        stored = codes.astype(dtypes.numpy_dtype(kind))
        size = dtypes.bits_of(scale_type) // 8
        writes: list[tuple[int, int, Any]] = [
            (1, tile.start * size, np.ascontiguousarray(scales.astype(dtypes.numpy_dtype(scale_type))).view(np.uint8))
        ]
        if self.has_zeros:
            packed = dtypes.pack(zeros.astype(dtypes.numpy_dtype(kind)), kind)
            writes.append((2, tile.start * dtypes.bits_of(kind) // 8, packed))
        if stored.shape == self.outputs[0].shape:
            return [*writes, (0, 0, dtypes.pack(stored, kind))]
        flat = np.ascontiguousarray(stored).view(np.uint8)
        if self.axis == 0:
            line = self.inputs[0].size // self.inputs[0].shape[0]
            return [*writes, (0, tile.start * line, flat.reshape(-1))]
        stride = self.inputs[0].shape[1]
        return [*writes, *((0, r * stride + tile.start, row) for r, row in enumerate(flat))]

    def finish(self, stats: list[dict[str, float]]) -> dict[str, Any]:
        """Sum the errors."""
        total = super().finish(stats)
        total["relative_error"] = float(np.sqrt(total["sq_error"] / total["sq_weight"])) if total["sq_weight"] else 0.0
        return total


def _scales(grid: Grid, low: Array, high: Array) -> tuple[Array, Array]:
    if grid.symmetric:
        scale = np.maximum(np.maximum(-low, high) / (grid.levels // 2), _TINY)
        return scale.astype(np.float32), np.full(len(low), (grid.lowest + grid.highest + 1) // 2, np.float32)
    scale = np.maximum((high - low) / grid.levels, _TINY).astype(np.float32)
    return scale, np.clip(np.rint(grid.lowest - low / scale), grid.lowest, grid.highest).astype(np.float32)


def _errors(grid: Grid, rows: Array, scales: Array, zeros: Array) -> Array:
    codes = np.clip(np.rint(rows / scales[:, None]) + zeros[:, None], grid.lowest, grid.highest)
    found: Array = np.sum(((codes - zeros[:, None]) * scales[:, None] - rows) ** 2, axis=1)
    return found
