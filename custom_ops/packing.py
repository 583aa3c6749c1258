"""Codes, scales and zero points to and from the bytes of a layout, in numpy; see :mod:`layout`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim_llm.custom_ops.layout import Layout, TileBuffers, storage_bits

__all__ = ["pack", "pack_bits", "unpack", "unpack_bits"]

Array = npt.NDArray[Any]


def pack_bits(codes: Array, bits: int) -> Array:
    """Packs the last axis, lowest bits first, padded with zero bits to whole bytes."""
    planes = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(planes.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def unpack_bits(packed: Array, bits: int, count: int) -> Array:
    """The first ``count`` codes of each row of a bit stream along the last axis."""
    together = 1 if 8 % bits == 0 else bits  # bytes after which codes begin with a whole byte
    short = -packed.shape[-1] % together
    padded = np.pad(packed, [(0, 0)] * (packed.ndim - 1) + [(0, short)]) if short else packed
    words = np.ascontiguousarray(padded).reshape(*packed.shape[:-1], -1, together)
    codes = np.empty((*words.shape[:-1], 8 * together // bits), np.uint8)
    for i in range(codes.shape[-1]):
        first, shift = divmod(i * bits, 8)
        code = words[..., first] >> np.uint8(shift)
        if shift + bits > 8:
            code = code | words[..., first + 1] << np.uint8(8 - shift)
        codes[..., i] = code
    mask = np.uint8((1 << bits) - 1)
    unpacked: Array = (codes & mask).reshape(*packed.shape[:-1], -1)[..., :count]
    return unpacked


def pack(codes: Array, scales: Array, zero: Array, buffers: TileBuffers, first_column: int, rows: int) -> None:
    """Puts codes [KB, block, N] and scales, zeros [KB, N] of a tile where the layout wants them.

    ``rows`` is K: what lies beyond it in the last block is padding.
    """
    spec, layout = buffers.spec, buffers.layout
    bits, columns = storage_bits(spec, layout), codes.shape[2]
    zeros = zero.astype(np.uint8)
    mine = slice(first_column, first_column + columns)
    if layout is Layout.NBITS:
        filled = codes.copy()
        short = rows - (codes.shape[0] - 1) * codes.shape[1]
        filled[-1, short:] = zeros[-1]
        buffers.codes[mine] = pack_bits(filled.transpose(2, 0, 1), bits)
        buffers.scales[mine] = scales.T
        if buffers.zero_points is not None:
            buffers.zero_points[mine] = pack_bits(zeros.T, bits)
        return
    matrix = codes.reshape(-1, columns)[:rows]
    if spec.symmetric:
        matrix = (matrix - np.uint8(2 ** (spec.bits - 1))) & np.uint8(2**bits - 1)
    if layout is Layout.BLOCKED_KN:
        buffers.scales[:, mine] = scales
        _put_columns(buffers.codes, matrix, bits, first_column, buffers.columns)
        if buffers.zero_points is not None:
            _put_columns(buffers.zero_points, zeros, bits, first_column, buffers.columns)
    else:
        buffers.scales[mine] = scales.T
        _put_flat(buffers.codes, matrix.T, bits, first_column)
        if buffers.zero_points is not None:
            _put_flat(buffers.zero_points, zeros.T, bits, first_column)


def _put_columns(to: Array, matrix: Array, bits: int, first_column: int, total_columns: int) -> None:
    if matrix.shape[1] == total_columns:
        to[:] = pack_bits(matrix.reshape(-1), bits)
        return
    start = first_column * bits // 8
    packed = pack_bits(matrix, bits)
    to.reshape(matrix.shape[0], -1)[:, start : start + packed.shape[1]] = packed


def _put_flat(to: Array, matrix: Array, bits: int, first_row: int) -> None:
    start = first_row * matrix.shape[1] * bits // 8
    packed = pack_bits(matrix.reshape(-1), bits)
    to[start : start + packed.size] = packed


def unpack(buffers: TileBuffers) -> tuple[Array, Array, Array]:
    """Codes [K, N] (unsigned), scales [KB, N] and zeros [KB, N] of a whole quantized weight, whatever its layout."""
    spec, rows, columns = buffers.spec, buffers.rows, buffers.columns
    bits, block, count = storage_bits(spec, buffers.layout), spec.block_rows(rows), spec.block_count(rows)
    zeros = np.full((count, columns), 2 ** (spec.bits - 1), np.uint8)
    if buffers.layout is Layout.NBITS:
        codes = unpack_bits(buffers.codes, bits, block).reshape(columns, -1)[:, :rows].T
        if buffers.zero_points is not None:
            zeros = unpack_bits(buffers.zero_points, bits, count).T
        return codes, buffers.scales.T, zeros
    flat = unpack_bits(buffers.codes, bits, rows * columns)
    if spec.symmetric:
        flat = (flat + np.uint8(2 ** (spec.bits - 1))) & np.uint8(2**bits - 1)
    by_row = buffers.layout is Layout.BLOCKED_KN
    if buffers.zero_points is not None:
        flat_zeros = unpack_bits(buffers.zero_points, bits, count * columns)
        zeros = flat_zeros.reshape(count, columns) if by_row else flat_zeros.reshape(columns, count).T
    if by_row:
        return flat.reshape(rows, columns), buffers.scales, zeros
    return flat.reshape(columns, rows).T, buffers.scales.T, zeros
