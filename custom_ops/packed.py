"""The packed weight in numpy: the byte format that the product kernels read as it lies in the file.

``src/packing/packed_weight.h`` describes the format and is its twin: both must give the same bytes. A packed weight is
one uint8 string: a header of 64 bytes, then strips of 16 columns, each a forward stream of chunks (codes, scales, zero
points). It holds what com.microsoft MatMulNBits holds and converts both ways without loss.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim_llm.custom_ops.packed_header import (
    HEADER,
    HEADER_BYTES,
    MAGIC,
    SCALE_DTYPES,
    STRIP_COLUMNS,
    VERSION,
    PackedScheme,
    header,
    lossless_scale_dtype,
    scheme_of_header,
)
from onnxslim_llm.custom_ops.packing import pack_bits, unpack_bits

__all__ = [
    "HEADER_BYTES",
    "MAGIC",
    "STRIP_COLUMNS",
    "VERSION",
    "PackedScheme",
    "codes_of_planes",
    "header",
    "lossless_scale_dtype",
    "pack",
    "parse",
    "planes_of",
    "unpack",
]

Array = npt.NDArray[Any]


def planes_of(codes: Array, bits: int) -> Array:
    """Codes [..., chunk_rows, 16] to the code bytes of chunks [..., bytes]."""
    *outer, rows, columns = codes.shape

    def vectors(values: Array, shared: int, width: int) -> Array:
        # k = shared group, then position in the byte, then vector, then which of 4 consecutive k.
        stride = 64 if bits < 4 else 32 if bits == 4 else 4
        cut = values.reshape(*outer, rows // stride, shared, stride // shared // 4, 4, columns)
        shifts = (np.arange(shared, dtype=np.uint8) * width)[:, None, None, None]
        merged = np.bitwise_or.reduce(cut << shifts, axis=-4)  # [..., groups, vectors, 4, columns]
        tiles: Array = np.swapaxes(merged, -1, -2).reshape(*outer, rows // stride, -1)
        return tiles

    parts = [vectors(codes & 3, 4, 2), vectors(codes >> 2, 8, 1)] if bits == 3 else [vectors(codes, 8 // bits, bits)]
    return np.concatenate(parts, axis=-1).reshape(*outer, -1)


def codes_of_planes(planes: Array, bits: int, rows: int) -> Array:
    """The inverse of :func:`planes_of`."""
    outer = planes.shape[:-1]
    stride = 64 if bits < 4 else 32 if bits == 4 else 4
    grouped = planes.reshape(*outer, rows // stride, -1)

    def values(data: Array, shared: int, width: int) -> Array:
        cut = data.reshape(*outer, rows // stride, 1, stride // shared // 4, STRIP_COLUMNS, 4)
        shifts = (np.arange(shared, dtype=np.uint8) * width)[:, None, None, None]
        apart = (cut >> shifts) & np.uint8(2**width - 1)
        rows_of: Array = np.swapaxes(apart, -1, -2).reshape(*outer, rows, STRIP_COLUMNS)
        return rows_of

    if bits == 3:
        codes: Array = values(grouped[..., :256], 4, 2) | (values(grouped[..., 256:], 8, 1) << np.uint8(2))
        return codes
    return values(grouped, 8 // bits, bits)


def pack(scheme: PackedScheme, codes: Array, scales: Array, zero_points: Array | None) -> npt.NDArray[np.uint8]:
    """Packs the arrays of MatMulNBits.

    Args:
        scheme: what to make; its scale dtype is that of ``scales``.
        codes: uint8 [N, KB, block * bits / 8], a bit stream, lowest bits first; KB = ceil(K / block).
        scales: [N, KB].
        zero_points: uint8 [N, ceil(KB * bits / 8)], None where symmetric.

    Returns:
        uint8 [scheme.size].
    """
    bits, block, middle = scheme.bits, scheme.block, np.uint8(2 ** (scheme.bits - 1))
    count, total = math.ceil(scheme.rows / block), scheme.chunks * scheme.chunk_rows
    columns, width = scheme.columns, scheme.strips * STRIP_COLUMNS
    places = scheme.column_places()

    zeros = np.full((width, total // block), middle, np.uint8)
    if zero_points is not None:
        zeros[places, :count] = unpack_bits(zero_points.reshape(columns, -1), bits, count)
    all_scales = np.zeros((width, total // block), SCALE_DTYPES[scheme.scale_dtype])
    all_scales[places, :count] = scales.reshape(columns, count)
    all_codes = np.repeat(zeros, block, axis=1)
    unpacked = unpack_bits(codes.reshape(columns, count, -1), bits, block).reshape(columns, -1)
    all_codes[places, : scheme.rows] = unpacked[:, : scheme.rows]

    def tiled(values: Array, per_chunk: int) -> Array:  # [width, n] -> [strips, chunks, per_chunk, 16]
        cut = values.reshape(scheme.strips, STRIP_COLUMNS, scheme.chunks, per_chunk)
        return np.ascontiguousarray(cut.transpose(0, 2, 3, 1))

    blocks = scheme.chunk_rows // block
    parts = [
        planes_of(tiled(all_codes, scheme.chunk_rows), bits),
        tiled(all_scales, blocks).reshape(scheme.strips, scheme.chunks, -1).view(np.uint8),
    ]
    if not scheme.symmetric:
        zero_tiles = tiled(zeros, blocks)
        if bits < 8:
            if blocks == 1:
                zero_tiles = np.concatenate([zero_tiles, np.zeros_like(zero_tiles)], axis=2)
            zero_tiles = zero_tiles[:, :, 0::2] | (zero_tiles[:, :, 1::2] << np.uint8(4))
        parts.append(zero_tiles.reshape(scheme.strips, scheme.chunks, -1))
    payload = np.concatenate(parts, axis=2).reshape(-1)
    return np.concatenate([header(scheme), payload])


def parse(packed: Array) -> PackedScheme:
    """What the header of a packed weight says.

    Raises:
        ValueError: the bytes are not a packed weight of this version, or not a whole one.
    """
    if packed.size < HEADER_BYTES:
        raise ValueError("the packed weight is shorter than its header")
    found = np.frombuffer(packed[:HEADER_BYTES].tobytes(), HEADER)[0]
    if found["magic"] != MAGIC:
        raise ValueError("these bytes are not a packed weight")
    if found["version"] != VERSION:
        raise ValueError(f"the packed weight has version {found['version']}, this library reads {VERSION}")
    scheme = scheme_of_header(found)
    if not np.array_equal(header(scheme), packed[:HEADER_BYTES]):
        raise ValueError("the sizes in the header of the packed weight contradict each other")
    if packed.size != scheme.size:
        raise ValueError(f"the packed weight has {packed.size} bytes, its header says {scheme.size}")
    return scheme


def unpack(packed: Array) -> tuple[PackedScheme, Array, Array, Array | None]:
    """The inverse of :func:`pack`: the scheme, codes, scales and zero points of MatMulNBits.

    Codes beyond K come back as the zero point of their block.

    Raises:
        ValueError: see :func:`parse`.
    """
    scheme = parse(packed)
    bits, block, count = scheme.bits, scheme.block, math.ceil(scheme.rows / scheme.block)
    code_bytes, scale_bytes, _zero_bytes = scheme.chunk_parts
    chunks = packed[HEADER_BYTES:].reshape(scheme.strips, scheme.chunks, -1)
    places = scheme.column_places()

    def columns_of(tiles: Array) -> Array:  # [strips, chunks, n, 16] -> [N, chunks * n]
        by_column: Array = tiles.transpose(0, 3, 1, 2).reshape(scheme.strips * STRIP_COLUMNS, -1)[places]
        return by_column

    blocks = scheme.chunk_rows // block
    codes = columns_of(codes_of_planes(chunks[:, :, :code_bytes], bits, scheme.chunk_rows))[:, : count * block]
    scale_data = np.ascontiguousarray(chunks[:, :, code_bytes : code_bytes + scale_bytes])
    scale_tiles = scale_data.view(SCALE_DTYPES[scheme.scale_dtype])
    scales = columns_of(scale_tiles.reshape(scheme.strips, scheme.chunks, blocks, STRIP_COLUMNS))[:, :count]
    zeros = None
    if not scheme.symmetric:
        stored = chunks[:, :, code_bytes + scale_bytes :].reshape(scheme.strips, scheme.chunks, -1, STRIP_COLUMNS)
        if bits < 8:
            stored = np.stack([stored & 15, stored >> 4], axis=3).reshape(*stored.shape[:2], -1, STRIP_COLUMNS)
        zeros = pack_bits(columns_of(stored[:, :, :blocks])[:, :count], bits)
    packed_codes = pack_bits(codes.reshape(scheme.columns, count, block), bits)
    return scheme, packed_codes, np.ascontiguousarray(scales), zeros
