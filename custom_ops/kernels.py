"""ctypes binding of the packed weights and their products; the interface is src/interface/onnxslim_matmul.h.

For compilers (packing), tests and benchmarks. A runtime calls the kernels through its own glue.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from onnxslim_llm.custom_ops import native
from onnxslim_llm.custom_ops.matmul_reference import Accuracy, Activation, Epilogue
from onnxslim_llm.custom_ops.packed import PackedScheme

__all__ = ["ISAS", "best_isa", "matmul", "pack", "supported_isas", "unpack"]

Array = npt.NDArray[Any]

ISAS = ("auto", "scalar", "avx2", "avxvnni", "avx512vnni", "amx", "neon_dotprod", "neon_i8mm")
"""Instruction sets of the products by their number in the C interface; "auto" is the best one or ONNXSLIM_LLM_ISA's."""

_SCALE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
_ELEMENT_TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 2}


class _Scheme(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("block", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("zero_points", ctypes.c_int32),
        ("column_order", ctypes.c_int32),
    )


class _Args(ctypes.Structure):
    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("packed_bytes", ctypes.c_int64),
        ("a", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("m", ctypes.c_int64),
        ("a_stride", ctypes.c_int64),
        ("y_stride", ctypes.c_int64),
        ("low_rank_u", ctypes.c_void_p),
        ("low_rank_v", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("residual_stride", ctypes.c_int64),
        ("type", ctypes.c_int32),
        ("accuracy", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("isa", ctypes.c_int32),
    )


@cache
def _library() -> ctypes.CDLL:
    library = native.opened()
    library.osl_packed_bytes.restype = ctypes.c_int64
    library.osl_packed_bytes.argtypes = (ctypes.POINTER(_Scheme),)
    for name in ("osl_pack_weight", "osl_unpack_weight", "osl_matmul"):
        getattr(library, name).restype = ctypes.c_char_p
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.osl_pack_weight.argtypes = (ctypes.POINTER(_Scheme), pointer, pointer, pointer, count, count, pointer)
    library.osl_unpack_weight.argtypes = (pointer, count, pointer, pointer, pointer)
    library.osl_matmul.argtypes = (ctypes.POINTER(_Args), count)
    return library


def _raise(error: bytes | None) -> None:
    if error is not None:
        raise ValueError(error.decode())


def _address(array: Array | None) -> int | None:
    return None if array is None else int(array.ctypes.data)


def supported_isas() -> tuple[str, ...]:
    """The instruction sets that this machine can run, slowest first."""
    return tuple(name for number, name in enumerate(ISAS) if number and _library().osl_supports_kernel_isa(number))


def best_isa() -> str:
    """The instruction set that "auto" means here."""
    return ISAS[_library().osl_best_kernel_isa()]


def _scheme(scheme: PackedScheme) -> _Scheme:
    return _Scheme(
        rows=scheme.rows,
        columns=scheme.columns,
        bits=scheme.bits,
        block=scheme.block,
        scale_type=_SCALE_TYPES[scheme.scale_dtype],
        zero_points=not scheme.symmetric,
        column_order=scheme.paired,
    )


def pack(
    scheme: PackedScheme,
    codes: Array,
    scales: Array,
    zero_points: Array | None,
    strips: Sequence[int] | None = None,
    out: Array | None = None,
) -> npt.NDArray[np.uint8]:
    """The native counterpart of :func:`packed.pack`; ``strips`` (first, last) does only a part, into ``out``.

    Raises:
        ValueError: the arrays do not fit the scheme.
        RuntimeError: there is no native library.
    """
    blocks = -(-scheme.rows // scheme.block)
    expected = {
        "codes": (codes, scheme.columns * blocks * scheme.block * scheme.bits // 8, np.dtype(np.uint8)),
        "scales": (
            scales,
            scheme.columns * blocks,
            np.dtype(getattr(ml_dtypes, scheme.scale_dtype, scheme.scale_dtype)),
        ),
    }
    if (zero_points is None) != scheme.symmetric:
        raise ValueError("zero points belong to asymmetric schemes, and only to them")
    if zero_points is not None:
        expected["zero points"] = (zero_points, scheme.columns * -(-blocks * scheme.bits // 8), np.dtype(np.uint8))
    for name, (array, size, dtype) in expected.items():
        if array.size != size or array.dtype != dtype:
            raise ValueError(f"{name}: {array.size} of {array.dtype} where the scheme needs {size} of {dtype}")
    packed = np.empty(scheme.size, np.uint8) if out is None else out
    if packed.size != scheme.size or packed.dtype != np.uint8 or not packed.flags.c_contiguous:
        raise ValueError(f"the packed weight has {scheme.size} bytes")
    first, last = strips or (0, scheme.strips)
    codes, scales = np.ascontiguousarray(codes), np.ascontiguousarray(scales)
    zeros = None if zero_points is None else np.ascontiguousarray(zero_points)
    header = _scheme(scheme)
    _raise(
        _library().osl_pack_weight(
            ctypes.byref(header), _address(codes), _address(scales), _address(zeros), first, last, _address(packed)
        )
    )
    return packed


def unpack(packed: Array, scheme: PackedScheme) -> tuple[Array, Array, Array | None]:
    """Codes, scales and zero points of MatMulNBits; ``scheme`` is what :func:`packed.parse` said.

    Raises:
        ValueError: the bytes are no packed weight.
    """
    blocks = -(-scheme.rows // scheme.block)
    codes = np.empty((scheme.columns, blocks, scheme.block * scheme.bits // 8), np.uint8)
    scales = np.empty((scheme.columns, blocks), getattr(ml_dtypes, scheme.scale_dtype, scheme.scale_dtype))
    zeros = None if scheme.symmetric else np.empty((scheme.columns, -(-blocks * scheme.bits // 8)), np.uint8)
    packed = np.ascontiguousarray(packed)
    _raise(
        _library().osl_unpack_weight(_address(packed), packed.size, _address(codes), _address(scales), _address(zeros))
    )
    return codes, scales, zeros


def matmul(
    a: Array,
    packed: Array,
    scheme: PackedScheme,
    accuracy: Accuracy = Accuracy.INT8,
    epilogue: Epilogue | None = None,
    isa: str = "auto",
    threads: int = 1,
) -> Array:
    """The native counterpart of :func:`matmul_reference.matmul`; work is cut for ``threads`` but done by one.

    Raises:
        ValueError: the arguments do not fit together, or this machine lacks the instruction set.
    """
    after = epilogue or Epilogue()
    if a.ndim != 2 or a.shape[1] != scheme.rows:
        raise ValueError(f"activations of shape {list(a.shape)} do not fit a weight of {scheme.rows} rows")
    if a.strides[1] != a.itemsize or a.strides[0] % a.itemsize or a.strides[0] < a.shape[1] * a.itemsize:
        a = np.ascontiguousarray(a)
    columns = scheme.columns // 2 if after.activation >= Activation.SILU_GATE else scheme.columns
    y = np.empty((a.shape[0], columns), a.dtype)
    bias = None if after.bias is None else np.ascontiguousarray(after.bias, a.dtype)
    residual = None if after.residual is None else np.ascontiguousarray(after.residual, a.dtype)
    u = None if after.low_rank_u is None else np.ascontiguousarray(after.low_rank_u, np.float32)
    v = None if after.low_rank_v is None else np.ascontiguousarray(after.low_rank_v, np.float32)
    packed = np.ascontiguousarray(packed)
    args = _Args(
        packed=_address(packed),
        packed_bytes=packed.size,
        a=_address(a),
        y=_address(y),
        m=a.shape[0],
        a_stride=max(a.strides[0] // a.itemsize, scheme.rows),
        y_stride=columns,
        low_rank_u=_address(u),
        low_rank_v=_address(v),
        rank=0 if u is None else u.shape[1],
        bias=_address(bias),
        residual=_address(residual),
        residual_stride=columns,
        type=_ELEMENT_TYPES[a.dtype],
        accuracy=int(accuracy),
        activation=int(after.activation),
        isa=ISAS.index(isa),
    )
    _raise(_library().osl_matmul(ctypes.byref(args), threads))
    return y
