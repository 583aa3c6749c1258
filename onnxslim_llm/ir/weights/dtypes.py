"""Element types: between ONNX numbers, numpy dtypes and packed bytes.

Sub-byte elements are packed as `raw_data` of a TensorProto wants them (onnx.proto, field 9): the first element in the
least significant bits, the last byte padded with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto, helper

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined]  # Python 3.12

__all__ = ["bits_of", "dtype_name", "numpy_dtype", "onnx_dtype", "pack", "packed_nbytes", "unpack"]

_SUB_BYTE_BITS: dict[int, int] = {
    TensorProto.UINT4: 4,
    TensorProto.INT4: 4,
    TensorProto.FLOAT4E2M1: 4,
    TensorProto.UINT2: 2,
    TensorProto.INT2: 2,
    TensorProto.FLOAT6E2M3: 6,
    TensorProto.FLOAT6E3M2: 6,
}
_BYTE = 8


@cache
def numpy_dtype(onnx_type: int) -> np.dtype[Any] | None:
    """Return the numpy (or ml_dtypes) dtype of an ONNX element type; None if this onnx does not know the number."""
    try:
        return np.dtype(helper.tensor_dtype_to_np_dtype(onnx_type))
    except KeyError:
        return None


def onnx_dtype(dtype: Any) -> int:
    """Return `TensorProto.DataType` of a numpy dtype, scalar type or name; integers pass through.

    Raises:
        TypeError: ONNX has no such element type.
    """
    if isinstance(dtype, int) and not isinstance(dtype, bool):
        return dtype
    return _onnx_dtype(np.dtype(dtype).newbyteorder("="))


@cache
def _onnx_dtype(dtype: np.dtype[Any]) -> int:
    if dtype.kind in "OUST":
        return int(TensorProto.STRING)
    try:
        return int(helper.np_dtype_to_tensor_dtype(dtype))
    except (KeyError, ValueError) as error:
        raise TypeError(f"ONNX has no element type for {dtype}") from error


def dtype_name(onnx_type: int) -> str:
    """Return the name of an ONNX element type, e.g. "INT4"; "type 99" for unknown numbers."""
    try:
        return str(TensorProto.DataType.Name(onnx_type))
    except ValueError:
        return f"type {onnx_type}"


@cache
def bits_of(onnx_type: int) -> int:
    """Return the bits of one packed element.

    Raises:
        TypeError: Strings and unknown types have no fixed size.
    """
    if onnx_type in _SUB_BYTE_BITS:
        return _SUB_BYTE_BITS[onnx_type]
    dtype = numpy_dtype(onnx_type)
    if dtype is None or dtype.kind == "O":
        raise TypeError(f"elements of {dtype_name(onnx_type)} have no fixed size")
    return dtype.itemsize * _BYTE


def packed_nbytes(shape: Sequence[int], onnx_type: int) -> int:
    """Return the bytes of a tensor of this shape and type as ONNX `raw_data`."""
    return -(-math.prod(shape) * bits_of(onnx_type) // _BYTE)


def pack(array: np.ndarray, onnx_type: int) -> np.ndarray:
    """Return the `raw_data` bytes of `array` (its dtype must be that of `onnx_type`) as a flat uint8 array.

    Copies only where it must: types of whole bytes that are contiguous come back as a view.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.dtype.byteorder == ">":
        flat = flat.astype(flat.dtype.newbyteorder("<"))
    codes = flat.view(np.uint8)
    bits = _SUB_BYTE_BITS.get(onnx_type)
    if bits is None:
        return codes
    if bits == 6:
        return _pack_stream(codes, bits)
    per_byte = _BYTE // bits
    padding = -codes.size % per_byte
    if padding:
        codes = np.concatenate([codes, np.zeros(padding, np.uint8)])
    groups = codes.reshape(-1, per_byte)
    mask = np.uint8((1 << bits) - 1)
    packed: np.ndarray = groups[:, 0] & mask
    for place in range(1, per_byte):
        packed |= (groups[:, place] & mask) << np.uint8(place * bits)
    return packed


def unpack(data: Buffer | np.ndarray, shape: Sequence[int], onnx_type: int) -> np.ndarray:
    """Return the tensor that `raw_data` holds; a view of `data` unless the elements are smaller than a byte."""
    dtype = numpy_dtype(onnx_type)
    if dtype is None or dtype.kind == "O":
        raise TypeError(f"{dtype_name(onnx_type)} cannot be read from raw bytes")
    stored = np.frombuffer(data, np.uint8)
    bits = _SUB_BYTE_BITS.get(onnx_type)
    if bits is None:
        return np.ndarray(tuple(shape), dtype, stored)
    count = math.prod(shape)
    if bits == 6:
        codes = _unpack_stream(stored, count, bits)
    else:
        per_byte = _BYTE // bits
        codes = np.empty((stored.size, per_byte), np.uint8)
        mask = np.uint8((1 << bits) - 1)
        for place in range(per_byte):
            codes[:, place] = (stored >> np.uint8(place * bits)) & mask
        codes = codes.reshape(-1)[:count]
    return codes.view(dtype).reshape(tuple(shape))


def _pack_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    # Element sizes that do not divide a byte run on from byte to byte, least significant bit first.
    planes = np.unpackbits(codes[:, None], axis=1, bitorder="little", count=bits)
    return np.packbits(planes.reshape(-1), bitorder="little")


def _unpack_stream(stored: np.ndarray, count: int, bits: int) -> np.ndarray:
    planes = np.unpackbits(stored, bitorder="little", count=count * bits).reshape(count, bits)
    return np.packbits(planes, axis=1, bitorder="little").reshape(-1)
