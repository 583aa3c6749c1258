"""Weights as they come: in a mapped file, in a TensorProto, or in an array."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.weights import dtypes
from onnxslim_llm.ir.weights.mapping import MappedFile
from onnxslim_llm.ir.weights.weight import Weight

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined]  # Python 3.12

__all__ = ["ArrayWeight", "MappedWeight", "ProtoWeight"]


class MappedWeight(Weight):
    """Bytes [offset, offset + nbytes) of a mapped file.

    Args:
        file: The file; its bounds were checked by whoever made the weight.
        offset: First byte.
        shape: Dimensions.
        onnx_dtype: Element type.
        proto: The TensorProto that pointed at the file, so that it can be written back as it was; without inline data.
    """

    def __init__(
        self, file: MappedFile, offset: int, shape: tuple[int, ...], onnx_dtype: int, proto: TensorProto | None = None
    ) -> None:
        super().__init__(shape, onnx_dtype)
        self.file = file
        self.offset = offset
        self.proto = proto

    @property
    def length(self) -> int:
        """Bytes in the file; the same as `nbytes`."""
        return self.nbytes

    @property
    def storage_key(self) -> Hashable:
        """Identity of the raw bytes, see `Weight.storage_key`."""
        return ("file", self.file.identity, self.offset, self.nbytes)

    def raw(self) -> Buffer:
        """Return the raw bytes, see `Weight.raw`."""
        return self.file.read(self.offset, self.nbytes)

    def release(self, start: int = 0, stop: int | None = None) -> None:
        """Drop mapped pages, see `Weight.release`."""
        stop = self.nbytes if stop is None else min(stop, self.nbytes)
        self.file.release(self.offset + start, stop - start)


class ProtoWeight(Weight):
    """Content of a TensorProto in memory, in whatever field it is; strings and unknown element types too.

    The proto is kept, not copied: it must not change any more.
    """

    def __init__(self, proto: TensorProto) -> None:
        nbytes = None
        if proto.data_type == TensorProto.STRING:
            nbytes = sum(len(text) for text in proto.string_data)
        elif dtypes.numpy_dtype(proto.data_type) is None:
            nbytes = len(proto.raw_data)
        super().__init__(tuple(proto.dims), proto.data_type, nbytes)
        self.proto = proto

    @property
    def storage_key(self) -> Hashable:
        """Identity of the raw bytes, see `Weight.storage_key`."""
        return ("proto", id(self.proto))

    def view(self) -> np.ndarray:
        """Return the content, see `Weight.view`."""
        # Reading raw_data copies it out of the message: readers at the same time share one copy.
        return self._shared(self._read)

    def _read(self) -> np.ndarray:
        try:
            return numpy_helper.to_array(self.proto).reshape(self.shape)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"unreadable tensor: {error}", where=f"tensor '{self.proto.name}'") from error

    def raw(self) -> Buffer:
        """Return the raw bytes, see `Weight.raw`."""
        if self.onnx_dtype == TensorProto.STRING:
            raise ModelError("a string tensor has no raw bytes", where=f"tensor '{self.proto.name}'")
        if self.proto.HasField("raw_data"):
            return self.proto.raw_data
        return dtypes.pack(self.view(), self.onnx_dtype)

    def digest(self) -> bytes:
        """Return the SHA-256, see `Weight.digest`; strings are hashed with their lengths."""
        if self._digest is None and self.onnx_dtype == TensorProto.STRING:
            self._digest = string_digest(list(self.proto.string_data), self.shape)
        return super().digest()

    @property
    def tensor(self) -> onnx.TensorProto:
        """The content as a proto of its own."""
        copy = TensorProto()
        copy.CopyFrom(self.proto)
        return copy


class ArrayWeight(Weight):
    """An array in memory, kept without a copy. The array must not change while someone relies on `key` or `digest`."""

    def __init__(self, array: np.ndarray, onnx_dtype: int | None = None) -> None:
        number = dtypes.onnx_dtype(array.dtype) if onnx_dtype is None else onnx_dtype
        nbytes = None
        if number == TensorProto.STRING:
            nbytes = sum(len(_encoded(text)) for text in array.reshape(-1))
        super().__init__(array.shape, number, nbytes)
        self.array = array

    @property
    def storage_key(self) -> Hashable:
        """Identity of the raw bytes, see `Weight.storage_key`."""
        return ("array", id(self.array))

    def view(self) -> np.ndarray:
        """Return the content, see `Weight.view`."""
        view = self.array.view()
        view.flags.writeable = False
        return view

    def load(self) -> np.ndarray:
        """Return the array itself: changing it in place changes the constant, as graphsurgeon users expect."""
        return self.array

    def raw(self) -> Buffer:
        """Return the raw bytes, see `Weight.raw`."""
        if self.onnx_dtype == TensorProto.STRING:
            raise ModelError("a string tensor has no raw bytes")
        return dtypes.pack(self.array, self.onnx_dtype)

    def digest(self) -> bytes:
        """Return the SHA-256, see `Weight.digest`; strings are hashed with their lengths."""
        if self._digest is None and self.onnx_dtype == TensorProto.STRING:
            self._digest = string_digest([_encoded(text) for text in self.array.reshape(-1)], self.shape)
        return super().digest()

    @property
    def tensor(self) -> onnx.TensorProto:
        """The content as a proto of its own."""
        if self.onnx_dtype == TensorProto.STRING:
            return TensorProto(
                dims=self.shape,
                data_type=self.onnx_dtype,
                string_data=[_encoded(text) for text in self.array.reshape(-1)],
            )
        return super().tensor


def string_digest(texts: list[bytes], shape: tuple[int, ...]) -> bytes:
    """Return the SHA-256 of a string tensor; lengths are hashed too, so that ["ab", ""] differs from ["a", "b"]."""
    digest = hashlib.sha256(f"{int(TensorProto.STRING)} {shape}\n".encode())
    for text in texts:
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return digest.digest()


def _encoded(text: object) -> bytes:
    return text if isinstance(text, bytes) else str(text).encode()
