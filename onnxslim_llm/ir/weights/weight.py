"""What every weight can do: say its type and size for free, give its content only when asked."""

from __future__ import annotations

import hashlib
import math
import weakref
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxslim_llm.ir.weights import dtypes

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined]  # Python 3.12

__all__ = ["CHUNK_BYTES", "Weight"]

CHUNK_BYTES = 4 << 20
"""Default size, in bytes, of the pieces in which contents are streamed."""


class Weight(LazyValues, metaclass=ABCMeta):  # type: ignore[misc]  # graphsurgeon is untyped
    """Content of a `gs.Constant`, loaded on demand.

    Weights are immutable and may be shared by several constants and by several models.

    Attributes:
        shape: Dimensions.
        onnx_dtype: Element type, a `TensorProto.DataType` number.
        dtype: The same as a numpy dtype (ml_dtypes for bfloat16, float8, int4, ...); the bare number if unknown.
        nbytes: Bytes of the content as ONNX `raw_data` (sub-byte elements packed); for strings the sum of their bytes.
    """

    def __init__(self, shape: tuple[int, ...], onnx_dtype: int, nbytes: int | None = None) -> None:
        # LazyValues.__init__ is not called: it wants a TensorProto in memory.
        self.shape = tuple(int(dim) for dim in shape)
        self.onnx_dtype = int(onnx_dtype)
        known = dtypes.numpy_dtype(self.onnx_dtype)
        self.dtype: Any = self.onnx_dtype if known is None else known
        self.nbytes = dtypes.packed_nbytes(self.shape, self.onnx_dtype) if nbytes is None else nbytes
        self._digest: bytes | None = None
        self._viewed: weakref.ref[np.ndarray] | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @abstractmethod
    def raw(self) -> Buffer:
        """Return the `raw_data` bytes (little endian, packed), without a copy where the source allows it.

        Raises:
            ModelError: Strings and sparse tensors have no raw bytes.
        """

    @property
    @abstractmethod
    def storage_key(self) -> Hashable:
        """Identity of the raw bytes: equal keys mean equal bytes. Compare only while both weights are alive."""

    @property
    def key(self) -> Hashable:
        """Identity of the content (bytes, type and shape), known without reading it."""
        return (self.storage_key, self.onnx_dtype, self.shape)

    @property
    def storage(self) -> Weight:
        """The weight whose bytes are stored for this one; itself unless it only relabels another weight's bytes."""
        return self

    def view(self) -> np.ndarray:
        """Return the content as a read-only array, zero-copy where possible (it may be strided or unaligned)."""
        return self._unpacked()

    def _unpacked(self) -> np.ndarray:
        array = dtypes.unpack(self.raw(), self.shape, self.onnx_dtype)
        array.flags.writeable = False
        return array

    def _shared(self, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return what `make` gives; those who look at the same time look at one array."""
        array = self._viewed() if self._viewed is not None else None
        if array is None:
            array = make()
            array.flags.writeable = False
            self._viewed = weakref.ref(array)
        return array

    def load(self) -> np.ndarray:
        """Return the content as an array that the caller owns (graphsurgeon calls this for `Constant.values`)."""
        return np.array(self.view())

    def release(self, start: int = 0, stop: int | None = None) -> None:
        """Drop mapped pages of bytes [start, stop) from resident memory; the content stays readable."""

    def chunks(self, limit: int = CHUNK_BYTES) -> Iterator[tuple[int, Buffer]]:
        """Yield (byte offset, bytes) pieces of the raw content in order, each at most about `limit` bytes."""
        raw = memoryview(self.raw()).cast("B") if self.nbytes else memoryview(b"")
        for start in range(0, self.nbytes, limit):
            yield start, raw[start : start + limit]

    def digest(self) -> bytes:
        """Return the SHA-256 of type, shape and content. Reads the content once, then remembers."""
        if self._digest is None:
            digest = hashlib.sha256(f"{self.onnx_dtype} {self.shape}\n".encode())
            for start, piece in self.chunks():
                digest.update(piece)
                self.release(start, start + len(memoryview(piece)))
            self._digest = digest.digest()
        return self._digest

    @property
    def tensor(self) -> onnx.TensorProto:
        """The content as a TensorProto, for `gs.export_onnx` and others that expect graphsurgeon's own lazy values."""
        return onnx.TensorProto(dims=self.shape, data_type=self.onnx_dtype, raw_data=bytes(self.raw()))

    def __str__(self) -> str:
        return f"{type(self).__name__}(shape={list(self.shape)}, {dtypes.dtype_name(self.onnx_dtype)})"
