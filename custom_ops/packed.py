"""The packed weight in numpy: the byte format that the product kernels read as it lies in the file.

``src/packing/packed_weight.h`` describes the format and is its twin: both must give the same bytes. A packed weight is
one uint8 string: a header of 64 bytes, then strips of 16 columns, each a forward stream of chunks (codes, scales, zero
points). It holds what com.microsoft MatMulNBits holds and converts both ways without loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from onnxslim_llm.custom_ops.packing import pack_bits, unpack_bits

__all__ = [
    "HEADER_BYTES",
    "STRIP_COLUMNS",
    "PackedScheme",
    "header",
    "lossless_scale_dtype",
    "pack",
    "parse",
    "scheme_of_header",
    "unpack",
]

Array = npt.NDArray[Any]
ScaleDtype = Literal["float32", "float16", "bfloat16"]

MAGIC = b"oslpack\n"
VERSION = 1
HEADER_BYTES = 64
STRIP_COLUMNS = 16

_SCALE_DTYPES: tuple[ScaleDtype, ...] = ("float32", "float16", "bfloat16")
_NUMPY_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u2"),
        ("header_bytes", "<u2"),
        ("bits", "u1"),
        ("scale_type", "u1"),
        ("zero_points", "u1"),
        ("column_order", "u1"),
        ("rows", "<i8"),
        ("columns", "<i8"),
        ("block", "<u4"),
        ("chunk_rows", "<u4"),
        ("chunk_bytes", "<u4"),
        ("strip_columns", "<u4"),
        ("payload_bytes", "<i8"),
        ("reserved", "S8"),
    ]
)
assert _HEADER.itemsize == HEADER_BYTES


@dataclass(frozen=True)
class PackedScheme:
    """What the header says.

    Attributes:
        rows: K, the axis that a product sums over.
        columns: N.
        bits: width of a code: 2, 3, 4 or 8.
        block: rows that share a scale: 16, 32, 64, 128 or 256.
        symmetric: the zero point of every block is 2^(bits - 1); otherwise each block stores one.
        scale_dtype: type of the stored scales.
        paired: the columns are two halves (a gate and what it multiplies) whose strips alternate.
    """

    rows: int
    columns: int
    bits: int = 4
    block: int = 32
    symmetric: bool = True
    scale_dtype: ScaleDtype = "float16"
    paired: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"bits must be 2, 3, 4 or 8, not {self.bits}")
        if self.block not in (16, 32, 64, 128, 256):
            raise ValueError(f"block must be 16, 32, 64, 128 or 256, not {self.block}")
        if self.scale_dtype not in _SCALE_DTYPES:
            raise ValueError(f"scale_dtype must be float32, float16 or bfloat16, not {self.scale_dtype}")
        if not (1 <= self.rows <= 2**31 and 1 <= self.columns <= 2**31):
            raise ValueError(f"a weight of shape [{self.rows}, {self.columns}] cannot be packed")
        if self.paired and self.columns % 2:
            raise ValueError(f"paired halves need an even number of columns, not {self.columns}")

    @property
    def chunk_rows(self) -> int:
        """Rows of K in a chunk; K is padded to a multiple."""
        return max(64, self.block)

    @property
    def chunks(self) -> int:
        """Chunks of a strip."""
        return math.ceil(self.rows / self.chunk_rows)

    @property
    def chunk_parts(self) -> tuple[int, int, int]:
        """Bytes of the codes, scales and zero points of a chunk."""
        blocks = self.chunk_rows // self.block
        zero_rows = 0 if self.symmetric else blocks if self.bits == 8 else math.ceil(blocks / 2)
        scale_bytes = _NUMPY_DTYPES[self.scale_dtype].itemsize
        return (
            self.chunk_rows * STRIP_COLUMNS * self.bits // 8,
            blocks * STRIP_COLUMNS * scale_bytes,
            zero_rows * STRIP_COLUMNS,
        )

    @property
    def strips(self) -> int:
        """Strips of 16 columns; N is padded to them, in each half where the columns are paired."""
        return (
            2 * math.ceil(self.columns / 2 / STRIP_COLUMNS) if self.paired else math.ceil(self.columns / STRIP_COLUMNS)
        )

    @property
    def payload_bytes(self) -> int:
        """Bytes after the header."""
        return self.strips * self.chunks * sum(self.chunk_parts)

    @property
    def size(self) -> int:
        """Bytes of the whole packed weight."""
        return HEADER_BYTES + self.payload_bytes

    def column_places(self) -> npt.NDArray[np.int64]:
        """For each of the N columns, its place among the 16 * strips packed ones."""
        columns = np.arange(self.columns, dtype=np.int64)
        if not self.paired:
            return columns
        half = self.columns // 2
        within = columns % half
        return (2 * (within // STRIP_COLUMNS) + columns // half) * STRIP_COLUMNS + within % STRIP_COLUMNS


def lossless_scale_dtype(scales: Array) -> ScaleDtype:
    """The narrowest type that holds float scales without changing a value: half precision where that is enough."""
    wide = scales.astype(np.float32)
    for name in ("float16", "bfloat16"):
        with np.errstate(over="ignore", invalid="ignore"):
            narrow = wide.astype(_NUMPY_DTYPES[name]).astype(np.float32)
        if np.array_equal(narrow, wide):
            return "float16" if name == "float16" else "bfloat16"
    return "float32"


def _planes(codes: Array, bits: int) -> Array:
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


def _codes_of(planes: Array, bits: int, rows: int) -> Array:
    """The inverse of :func:`_planes`."""
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
    all_scales = np.zeros((width, total // block), _NUMPY_DTYPES[scheme.scale_dtype])
    all_scales[places, :count] = scales.reshape(columns, count)
    all_codes = np.repeat(zeros, block, axis=1)
    unpacked = unpack_bits(codes.reshape(columns, count, -1), bits, block).reshape(columns, -1)
    all_codes[places, : scheme.rows] = unpacked[:, : scheme.rows]

    def tiled(values: Array, per_chunk: int) -> Array:  # [width, n] -> [strips, chunks, per_chunk, 16]
        cut = values.reshape(scheme.strips, STRIP_COLUMNS, scheme.chunks, per_chunk)
        return np.ascontiguousarray(cut.transpose(0, 2, 3, 1))

    blocks = scheme.chunk_rows // block
    parts = [
        _planes(tiled(all_codes, scheme.chunk_rows), bits),
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


def header(scheme: PackedScheme) -> npt.NDArray[np.uint8]:
    """The first bytes of a packed weight."""
    fields = np.zeros((), _HEADER)
    values = {
        "magic": MAGIC,
        "version": VERSION,
        "header_bytes": HEADER_BYTES,
        "bits": scheme.bits,
        "scale_type": _SCALE_DTYPES.index(scheme.scale_dtype),
        "zero_points": not scheme.symmetric,
        "column_order": scheme.paired,
        "rows": scheme.rows,
        "columns": scheme.columns,
        "block": scheme.block,
        "chunk_rows": scheme.chunk_rows,
        "chunk_bytes": sum(scheme.chunk_parts),
        "strip_columns": STRIP_COLUMNS,
        "payload_bytes": scheme.payload_bytes,
    }
    for name, value in values.items():
        fields[name] = value
    return np.frombuffer(fields.tobytes(), np.uint8)


def parse(packed: Array) -> PackedScheme:
    """What the header of a packed weight says.

    Raises:
        ValueError: the bytes are not a packed weight of this version, or not a whole one.
    """
    if packed.size < HEADER_BYTES:
        raise ValueError("the packed weight is shorter than its header")
    found = np.frombuffer(packed[:HEADER_BYTES].tobytes(), _HEADER)[0]
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


def scheme_of_header(found: np.void) -> PackedScheme:
    """The scheme in a header, which the sparse form has, too."""
    if found["scale_type"] >= len(_SCALE_DTYPES):
        raise ValueError("the packed weight has an unknown type of scales")
    return PackedScheme(
        rows=int(found["rows"]),
        columns=int(found["columns"]),
        bits=int(found["bits"]),
        block=int(found["block"]),
        symmetric=not found["zero_points"],
        scale_dtype=_SCALE_DTYPES[found["scale_type"]],
        paired=bool(found["column_order"]),
    )


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
    codes = columns_of(_codes_of(chunks[:, :, :code_bytes], bits, scheme.chunk_rows))[:, : count * block]
    scale_data = np.ascontiguousarray(chunks[:, :, code_bytes : code_bytes + scale_bytes])
    scale_tiles = scale_data.view(_NUMPY_DTYPES[scheme.scale_dtype])
    scales = columns_of(scale_tiles.reshape(scheme.strips, scheme.chunks, blocks, STRIP_COLUMNS))[:, :count]
    zeros = None
    if not scheme.symmetric:
        stored = chunks[:, :, code_bytes + scale_bytes :].reshape(scheme.strips, scheme.chunks, -1, STRIP_COLUMNS)
        if bits < 8:
            stored = np.stack([stored & 15, stored >> 4], axis=3).reshape(*stored.shape[:2], -1, STRIP_COLUMNS)
        zeros = pack_bits(columns_of(stored[:, :, :blocks])[:, :count], bits)
    packed_codes = pack_bits(codes.reshape(scheme.columns, count, block), bits)
    return scheme, packed_codes, np.ascontiguousarray(scales), zeros
