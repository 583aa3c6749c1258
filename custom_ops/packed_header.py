"""The header of packed weights: which weight they hold, and how its bytes are arranged.

``src/packing/packed_weight.h`` describes it and is its twin. The dense and the sparse form both have it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

__all__ = [
    "HEADER",
    "HEADER_BYTES",
    "MAGIC",
    "SCALE_DTYPES",
    "STRIP_COLUMNS",
    "VERSION",
    "PackedScheme",
    "header",
    "lossless_scale_dtype",
    "scheme_of_header",
]

Array = npt.NDArray[Any]
ScaleDtype = Literal["float32", "float16", "bfloat16"]

MAGIC = b"oslpack\n"
VERSION = 1
HEADER_BYTES = 64
STRIP_COLUMNS = 16

_SCALE_DTYPES: tuple[ScaleDtype, ...] = ("float32", "float16", "bfloat16")
SCALE_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
HEADER = np.dtype(
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
assert HEADER.itemsize == HEADER_BYTES


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
        scale_bytes = SCALE_DTYPES[self.scale_dtype].itemsize
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
            narrow = wide.astype(SCALE_DTYPES[name]).astype(np.float32)
        if np.array_equal(narrow, wide):
            return "float16" if name == "float16" else "bfloat16"
    return "float32"


def header(scheme: PackedScheme) -> npt.NDArray[np.uint8]:
    """The first bytes of a packed weight."""
    fields = np.zeros((), HEADER)
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
