"""What a block-quantized weight looks like: its scheme and its bytes.

The logical weight is W[K, N]; K is the axis that a matrix product sums over, and blocks run along K. An embedding table
[V, D] is the weight with K = D and N = V. A weight is stored as ``scale * (code - zero)``, with codes in [0, 2^bits).
Symmetric schemes have no zero point: zero is 2^(bits - 1) for every block.

Byte layouts (KB = ceil(K / block)):

=============  =======================================  ===============  ==============================================
layout         codes                                    scales           zero points
=============  =======================================  ===============  ==============================================
``nbits``      [N, KB, block * bits / 8], lowest bits   [N, KB]          [N, ceil(KB * bits / 8)], each row packed alone
               first; a short last block is filled
               with the code of 0
``blocked_kn`` [K, N], row-major, packed without gaps   [KB, N]          [KB, N], packed without gaps
``blocked_nk`` [N, K], row-major, packed without gaps   [N, KB]          [N, KB], packed without gaps
=============  =======================================  ===============  ==============================================

``nbits`` is what com.microsoft MatMulNBits and GatherBlockQuantized (uint8 data) read. The blocked layouts are the
raw_data of ONNX tensors for DequantizeLinear with axis 0 on [K, N] or axis 1 on [N, K]: UINT2/UINT4/UINT8 when there
are zero points, otherwise INT2/INT4/INT8 in two's complement (code - 2^(bits - 1)). ONNX has no 3-bit type, so 3-bit
codes are stored in 4 bits there; ``nbits`` stores them as a bit stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = ["BlockSpec", "Layout", "TileBuffers", "column_alignment", "storage_bits"]

ScaleDtype = Literal["float32", "float16"]
Array = npt.NDArray[Any]


class Layout(StrEnum):
    """Byte layout of a quantized weight; see the table of this module."""

    NBITS = "nbits"
    BLOCKED_KN = "blocked_kn"
    BLOCKED_NK = "blocked_nk"


@dataclass(frozen=True)
class BlockSpec:
    """How a weight is cut into blocks and coded.

    Attributes:
        bits: width of a code, one of 2, 3, 4, 8.
        block: rows of W that share a scale: a power of two from 16 to 256, or -1 for one block per column.
        symmetric: no zero points; the whole range [-2^(bits-1), 2^(bits-1) - 1] is used, so scales may be negative.
        scale_dtype: the type that scales are stored in. Codes are chosen for the scale as stored.
    """

    bits: int = 4
    block: int = 32
    symmetric: bool = True
    scale_dtype: ScaleDtype = "float32"

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"bits must be 2, 3, 4 or 8, not {self.bits}")
        if self.block not in (-1, 16, 32, 64, 128, 256):
            raise ValueError(f"block must be 16, 32, 64, 128, 256 or -1 (one block per column), not {self.block}")
        if self.scale_dtype not in ("float32", "float16"):
            raise ValueError(f"scale_dtype must be float32 or float16, not {self.scale_dtype}")

    def block_rows(self, rows: int) -> int:
        """Rows of one block of a weight with that many rows."""
        return rows if self.block == -1 else self.block

    def block_count(self, rows: int) -> int:
        """KB, the blocks of one column; the last one may be short."""
        return math.ceil(rows / self.block_rows(rows))


def storage_bits(spec: BlockSpec, layout: Layout) -> int:
    """Bits that one code takes in a layout."""
    return 4 if spec.bits == 3 and layout is not Layout.NBITS else spec.bits


def column_alignment(spec: BlockSpec, layout: Layout, rows: int, columns: int) -> int:
    """First columns of tiles must be multiples of this, so that no byte belongs to two tiles."""
    bits = storage_bits(spec, layout)
    if layout is Layout.NBITS:
        return 1
    if layout is Layout.BLOCKED_KN:
        return 8 // bits if columns * bits % 8 == 0 else columns
    codes_per_column = rows if spec.symmetric else math.gcd(rows, spec.block_count(rows))
    return 8 // math.gcd(8, codes_per_column * bits)


@dataclass(frozen=True)
class TileBuffers:
    """The three arrays of one whole weight, filled tile by tile.

    Attributes:
        spec: the scheme.
        layout: the byte layout.
        rows: K.
        columns: N.
        codes: uint8, [N, KB, bytes of a block] in ``nbits``, flat otherwise.
        scales: float32 or float16, [N, KB] or [KB, N].
        zero_points: uint8, [N, ceil(KB * bits / 8)] in ``nbits``, flat otherwise; None when symmetric.

    All are C-contiguous, writable, and zero before the first tile.
    """

    spec: BlockSpec
    layout: Layout
    rows: int
    columns: int
    codes: Array
    scales: Array
    zero_points: Array | None

    @classmethod
    def allocate(cls, spec: BlockSpec, layout: Layout, rows: int, columns: int) -> TileBuffers:
        """Zero-filled arrays for W[rows, columns]."""
        if rows < 1 or columns < 1:
            raise ValueError(f"a weight of shape [{rows}, {columns}] has nothing to quantize")
        bits, block, blocks = storage_bits(spec, layout), spec.block_rows(rows), spec.block_count(rows)
        code_shape: tuple[int, ...] = (_bytes_for(rows * columns, bits),)
        zero_shape: tuple[int, ...] = (_bytes_for(blocks * columns, bits),)
        if layout is Layout.NBITS:
            code_shape = (columns, blocks, _bytes_for(block, bits))
            zero_shape = (columns, _bytes_for(blocks, bits))
        codes = np.zeros(code_shape, np.uint8)
        scales = np.zeros((blocks, columns) if layout is Layout.BLOCKED_KN else (columns, blocks), spec.scale_dtype)
        zero_points = None if spec.symmetric else np.zeros(zero_shape, np.uint8)
        return cls(spec, layout, rows, columns, codes, scales, zero_points)


def _bytes_for(codes: int, bits: int) -> int:
    return (codes * bits + 7) // 8
