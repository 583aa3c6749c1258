"""Few-bit weights that a model already holds, read column by column with their exact codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from onnxslim_llm.concepts.block_weights import WeightScheme
from onnxslim_llm.custom_ops import available, kernels, packed
from onnxslim_llm.custom_ops.packed import HEADER_BYTES, STRIP_COLUMNS, PackedScheme
from onnxslim_llm.custom_ops.packing import pack_bits, unpack_bits
from onnxslim_llm.ir.weights import AliasWeight
from onnxslim_llm.ir.weights.weight import Weight

__all__ = ["Columns", "NBitsSource", "PackedSource", "RangeSource", "StoredSource", "WidenedSource"]

Array = NDArray[Any]

_SCALE_TYPES: dict[int, Any] = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16"}


@dataclass(frozen=True)
class Columns:
    """A range of n columns as MatMulNBits stores them.

    Attributes:
        codes: uint8 [n, KB, bytes of a block].
        scales: [n, KB].
        zero_points: uint8 [n, bytes]; None where they are 2^(bits - 1).
    """

    codes: Array
    scales: Array
    zero_points: Array | None


class StoredSource(ABC):
    """Where codes, scales and zero points are.

    Attributes:
        weights: What is read.
        rows: K.
        columns: N.
        scheme: How they are coded.
    """

    weights: tuple[Weight, ...]
    rows: int
    columns: int
    scheme: WeightScheme

    @property
    @abstractmethod
    def described(self) -> str:
        """Stable text: together with the content of the weights it says what is read."""

    @abstractmethod
    def read(self, first: int, last: int) -> Columns:
        """Return columns [first, last); both are multiples of 16, or N."""

    @property
    def alignment(self) -> int:
        """Columns that `read` may begin with are multiples of this."""
        return STRIP_COLUMNS

    @abstractmethod
    def touched(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """Return (index of the weight, first byte, one past the last) of what `read` looks at."""


class NBitsSource(StoredSource):
    """The inputs of com.microsoft MatMulNBits, or of GatherBlockQuantized with uint8 data.

    Args:
        codes: uint8 with N * KB * block * bits / 8 bytes, in any shape.
        scales: float32 or float16 with N * KB elements, in any shape.
        zero_points: uint8 with N * ceil(KB * bits / 8) bytes, in any shape; None where they are 2^(bits - 1).
        rows, columns, bits, block: K, N, and how they are coded.

    Raises:
        ValueError: The sizes do not fit together.
    """

    def __init__(
        self,
        codes: Weight,
        scales: Weight,
        zero_points: Weight | None,
        *,
        rows: int,
        columns: int,
        bits: int,
        block: int,
    ) -> None:
        blocks = -(-rows // block)
        if scales.onnx_dtype not in _SCALE_TYPES:
            raise ValueError(f"its scales are of type {scales.dtype}")
        self.rows, self.columns = rows, columns
        self.scheme = WeightScheme(bits, block, zero_points is None, "rtn", _SCALE_TYPES[scales.onnx_dtype])
        self.shapes = ((columns, blocks, block * bits // 8), (columns, blocks), (columns, -(-blocks * bits // 8)))
        # One shape for one content, so that a table and a classifier with the same bytes are seen to share them.
        kinds = (TensorProto.UINT8, scales.onnx_dtype, TensorProto.UINT8)
        given = [codes, scales] if zero_points is None else [codes, scales, zero_points]
        self.weights = tuple(AliasWeight(*part) for part in zip(given, self.shapes, kinds, strict=False))

    @property
    def alignment(self) -> int:
        """Any column will do."""
        return 1

    @property
    def described(self) -> str:
        """Return the sizes and the scheme."""
        return f"nbits K={self.rows} N={self.columns} {self.scheme}"

    def read(self, first: int, last: int) -> Columns:
        """Return views."""
        parts = [weight.view()[first:last] for weight in self.weights]
        return Columns(parts[0], parts[1], parts[2] if len(parts) > 2 else None)

    def touched(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """Return whole rows of every weight."""
        lines = [weight.nbytes // self.columns for weight in self.weights]
        return [(i, first * line, last * line) for i, line in enumerate(lines)]


class PackedSource(StoredSource):
    """The weight of MatMulPacked, or one half of one that is packed for a gate.

    Args:
        weight: uint8 [bytes].
        half: 0 or 1 where the columns are paired.

    Raises:
        ValueError: The bytes are no packed weight, or scales are of a type that concepts do not have.
    """

    def __init__(self, weight: Weight, half: int = 0) -> None:
        found = packed.parse(weight.view()[:])
        if found.scale_dtype == "bfloat16":
            raise ValueError("its scales are of type bfloat16")
        self.weights, self.half, self.packed_scheme = (weight,), half, found
        self.rows, self.columns = found.rows, found.columns // (2 if found.paired else 1)
        self.scheme = WeightScheme(found.bits, found.block, found.symmetric, "rtn", found.scale_dtype)

    @property
    def described(self) -> str:
        """Return which half it is; the rest is in the bytes."""
        return f"packed v{packed.VERSION} half {self.half}"

    def _range(self, first: int, last: int) -> tuple[int, int]:
        """Return the bytes of the strips that hold these columns, of both halves."""
        scheme = self.packed_scheme
        strips = 2 if scheme.paired else 1
        size = scheme.payload_bytes // scheme.strips * strips
        return HEADER_BYTES + first // STRIP_COLUMNS * size, HEADER_BYTES + -(-last // STRIP_COLUMNS) * size

    def read(self, first: int, last: int) -> Columns:
        """Return the columns, put back into the order of MatMulNBits."""
        scheme, halves = self.packed_scheme, 2 if self.packed_scheme.paired else 1
        part = PackedScheme(
            scheme.rows,
            (last - first) * halves,
            scheme.bits,
            scheme.block,
            scheme.symmetric,
            scheme.scale_dtype,
            scheme.paired,
        )
        start, stop = self._range(first, last)
        piece = np.concatenate([packed.header(part), self.weights[0].view()[start:stop]])
        codes, scales, zeros = kernels.unpack(piece, part) if available() else packed.unpack(piece)[1:]
        own = slice(self.half * (last - first), (self.half + 1) * (last - first))
        return Columns(codes[own], scales[own], None if zeros is None else zeros[own])

    def touched(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """Return the strips."""
        return [(0, *self._range(first, last))]


class RangeSource(StoredSource):
    """Some of another source's columns.

    Args:
        base: It.
        first, last: The columns [first, last); `first` is a multiple of the base's alignment.
    """

    def __init__(self, base: StoredSource, first: int, last: int) -> None:
        self.base, self.first = base, first
        self.weights, self.scheme = base.weights, base.scheme
        self.rows, self.columns = base.rows, last - first

    @property
    def alignment(self) -> int:
        """That of the base."""
        return self.base.alignment

    @property
    def described(self) -> str:
        """Return what the base is, and which columns."""
        return f"columns {self.first} to {self.first + self.columns} of {self.base.described}"

    def read(self, first: int, last: int) -> Columns:
        """Return columns, counted from the first one of the range."""
        return self.base.read(self.first + first, self.first + last)

    def touched(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """Return what `read` looks at."""
        return self.base.touched(self.first + first, self.first + last)


class WidenedSource(StoredSource):
    """Another source's numbers in codes of 4 bits instead of 3, for runtimes that have none of 3.

    Args:
        base: It.
    """

    _WIDTH = 4

    def __init__(self, base: StoredSource) -> None:
        self.base = base
        self.weights, self.rows, self.columns = base.weights, base.rows, base.columns
        self.scheme = replace(base.scheme, bits=self._WIDTH)

    @property
    def alignment(self) -> int:
        """That of the base."""
        return self.base.alignment

    @property
    def described(self) -> str:
        """Return what the base is."""
        return f"{self._WIDTH} bits for {self.base.described}"

    def read(self, first: int, last: int) -> Columns:
        """Return columns: the same scales, and codes as far from their zero points as they were."""
        found, bits, block = self.base.read(first, last), self.base.scheme.bits, self.scheme.block
        middle = (1 << self._WIDTH - 1) - (1 << bits - 1) if self.scheme.symmetric else 0
        codes = pack_bits(unpack_bits(found.codes, bits, block) + np.uint8(middle), self._WIDTH)
        zeros = found.zero_points
        if zeros is not None:
            zeros = pack_bits(unpack_bits(zeros, bits, -(-self.rows // block)), self._WIDTH)
        return Columns(codes, found.scales, zeros)

    def touched(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """Return what the base looks at."""
        return self.base.touched(first, last)
