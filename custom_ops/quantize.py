"""Quantizes a weight, or a tile of one, into the bytes that a runtime reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
import numpy.typing as npt

import onnxslim_llm.custom_ops as custom_ops
from onnxslim_llm.custom_ops import native, reference
from onnxslim_llm.custom_ops.layout import BlockSpec, Layout, TileBuffers, column_alignment

__all__ = ["BlockSpec", "Layout", "Method", "TileBuffers", "TileResult", "column_alignment", "quantize_tile"]

Method = Literal["rtn", "search", "hqq"]
Array = npt.NDArray[Any]

_WEIGHT_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


@dataclass(frozen=True)
class TileResult:
    """A quantized tile.

    Attributes:
        buffers: the arrays that the tile was written to.
        sq_error: sum of (w - dequantized)^2 over the tile.
        sq_weight: sum of w^2 over the tile.
        nonfinite: NaN and infinite weights; they were quantized as 0.
        first_nonfinite: position k * columns + n of the first of those in the tile, or None.
    """

    buffers: TileBuffers
    sq_error: float
    sq_weight: float
    nonfinite: int
    first_nonfinite: int | None

    @property
    def codes(self) -> Array:
        """Packed codes, uint8."""
        return self.buffers.codes

    @property
    def scales(self) -> Array:
        """Scales in the type of the scheme."""
        return self.buffers.scales

    @property
    def zero_points(self) -> Array | None:
        """Packed zero points, uint8; None when symmetric."""
        return self.buffers.zero_points


def quantize_tile(
    weight: Array,
    spec: BlockSpec,
    method: Method = "rtn",
    importance: Array | None = None,
    layout: Layout | str = Layout.NBITS,
    out: TileBuffers | None = None,
    first_column: int = 0,
) -> TileResult:
    """Quantizes W[K, n] in blocks along K with the native library, or with the reference where there is none.

    Both give the same bits. Thread-safe; the native library releases the interpreter lock.

    Args:
        weight: W[K, n], float32, float16 or ml_dtypes.bfloat16, any strides: pass ``w.T`` for a weight stored [N, K].
        spec: bits, block, symmetry, type of the scales.
        method: "rtn" takes the range of each block; "search" looks for the scale and zero point with the least squared
            error, at several times the cost; "hqq" for the scale with the least sum of |w - dequantized|^(1/2), which
            large errors count less in.
        importance: d[K], finite and not negative: weights of the terms of those sums. Default all ones, which gave a
            lower KL divergence than weights that grow with |w| on small Llamas at 3 and 4 bits ("search").
        layout: the byte layout.
        out: buffers of the whole weight W[K, N] that this is a tile of; default: new ones for this tile alone.
        first_column: where the tile lies in ``out``; a multiple of :func:`column_alignment`.

    Raises:
        ValueError: an argument that does not fit the others; the message says which.
        TypeError: a weight of another type.
    """
    layout = Layout(layout)
    _check_weight(weight, method)
    rows, columns = weight.shape
    checked = None if importance is None else _checked_importance(importance, rows)
    if out is None:
        out = TileBuffers.allocate(spec, layout, rows, columns)
    _check_buffers(out, spec, layout, rows, columns, first_column)
    quantize_into = native.quantize_into if custom_ops.available() else reference.quantize_into
    found = quantize_into(weight, out, first_column, method, checked)
    return TileResult(out, found.sq_error, found.sq_weight, found.nonfinite, found.first_nonfinite)


def _check_weight(weight: Array, method: str) -> None:
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, not {method!r}")
    if weight.dtype not in _WEIGHT_DTYPES:
        raise TypeError(f"weights must be float32, float16 or bfloat16, not {weight.dtype}")
    if weight.ndim != 2 or weight.size == 0:
        raise ValueError(f"a weight must be a matrix W[K, N] with at least one element, not of shape {weight.shape}")


def _checked_importance(importance: Array, rows: int) -> npt.NDArray[np.float32]:
    values = np.ascontiguousarray(importance, dtype=np.float32)
    if values.shape != (rows,):
        raise ValueError(f"importance must have shape ({rows},), one value per row of W, not {values.shape}")
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("importance must be finite and not negative")
    return values


def _check_buffers(
    out: TileBuffers, spec: BlockSpec, layout: Layout, rows: int, columns: int, first_column: int
) -> None:
    if (out.spec, out.layout, out.rows) != (spec, layout, rows):
        raise ValueError(
            f"a tile of {rows} rows in {spec}, {layout} does not fit "
            f"buffers of {out.rows} rows in {out.spec}, {out.layout}"
        )
    end = first_column + columns
    if first_column < 0 or end > out.columns:
        raise ValueError(f"columns {first_column} to {end} lie outside of the {out.columns} columns of the buffers")
    alignment = column_alignment(spec, layout, rows, out.columns)
    if first_column % alignment or (end % alignment and end != out.columns):
        raise ValueError(f"tiles of this weight in {layout} must begin and end at multiples of {alignment} columns")
