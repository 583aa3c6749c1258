"""ctypes binding of the native library; its interface is src/interface/onnxslim_native.h.

Calls release the interpreter lock, so threads that quantize different tiles run in parallel.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from onnxslim_llm.custom_ops.layout import Layout, TileBuffers
from onnxslim_llm.custom_ops.reference import Statistics

__all__ = ["ISAS", "Loaded", "best_isa", "load", "opened", "quantize_into", "supported_isas"]

ISAS = ("auto", "scalar", "avx2", "avx512")
"""Instruction sets by their number in the C interface; "auto" is the best of this machine or ONNXSLIM_LLM_ISA's."""

_ABI_VERSION = 2
_DTYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 2}
_SCALE_DTYPES = {"float32": 0, "float16": 1}
_METHODS = {"rtn": 0, "search": 1, "hqq": 2}
_LAYOUTS = {Layout.NBITS: 0, Layout.BLOCKED_KN: 1, Layout.BLOCKED_NK: 2}
_ERRORS = {1: "an argument is out of range", 2: "out of memory", 3: "this machine lacks the instruction set"}


class _Args(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("stride_k", ctypes.c_int64),
        ("stride_n", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("importance", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zero_points", ctypes.c_void_p),
        ("first_column", ctypes.c_int64),
        ("total_columns", ctypes.c_int64),
        ("weight_dtype", ctypes.c_int32),
        ("scale_dtype", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("symmetric", ctypes.c_int32),
        ("method", ctypes.c_int32),
        ("layout", ctypes.c_int32),
        ("isa", ctypes.c_int32),
    )


class _Stats(ctypes.Structure):
    _fields_ = (
        ("sq_error", ctypes.c_double),
        ("sq_weight", ctypes.c_double),
        ("nonfinite", ctypes.c_int64),
        ("first_nonfinite", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Loaded:
    """The library, or the reason why there is none."""

    library: ctypes.CDLL | None
    reason: str = ""


@cache
def load() -> Loaded:
    """Loads the library once; never raises."""
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    # importlib.resources also finds it in an editable install, where it does not lie beside this file.
    file = resources.files("onnxslim_llm.custom_ops") / f"libonnxslim_llm_native{suffix}"
    if not file.is_file():
        return Loaded(None, "the native library was not built (no C++ compiler?): numpy reference in use")
    try:
        library = ctypes.CDLL(str(file))
        version = int(library.osl_abi_version())
    except (OSError, AttributeError) as error:
        return Loaded(None, f"the native library does not load ({error}): numpy reference in use")
    if version != _ABI_VERSION:
        return Loaded(None, f"the native library has interface {version}, not {_ABI_VERSION}: reinstall")
    library.osl_quantize_tile.argtypes = (ctypes.POINTER(_Args), ctypes.POINTER(_Stats))
    return Loaded(library)


def opened() -> ctypes.CDLL:
    """The library.

    Raises:
        RuntimeError: there is none.
    """
    loaded = load()
    if loaded.library is None:
        raise RuntimeError(loaded.reason)
    return loaded.library


def supported_isas() -> tuple[str, ...]:
    """The instruction sets that this machine can run, slowest first."""
    return tuple(name for number, name in enumerate(ISAS) if number and opened().osl_supports_isa(number))


def best_isa() -> str:
    """The instruction set that "auto" means here."""
    return ISAS[opened().osl_best_isa()]


def quantize_into(
    weight: npt.NDArray[Any],
    buffers: TileBuffers,
    first_column: int,
    method: str,
    importance: npt.NDArray[np.float32] | None,
    isa: str = "auto",
) -> Statistics:
    """The native counterpart of :func:`reference.quantize_into`; arguments must have passed ``quantize_tile``'s checks.

    Raises:
        RuntimeError: no library, or it refused the arguments.
        MemoryError: no memory for the working buffers.
    """
    spec, (rows, columns) = buffers.spec, weight.shape
    if any(stride % weight.itemsize for stride in weight.strides):
        weight = np.ascontiguousarray(weight)
    stride_k, stride_n = (stride // weight.itemsize for stride in weight.strides)
    zero_points = buffers.zero_points
    args = _Args(
        weight=weight.ctypes.data,
        stride_k=stride_k,
        stride_n=stride_n,
        rows=rows,
        columns=columns,
        block=spec.block_rows(rows),
        importance=None if importance is None else importance.ctypes.data,
        codes=buffers.codes.ctypes.data,
        scales=buffers.scales.ctypes.data,
        zero_points=None if zero_points is None else zero_points.ctypes.data,
        first_column=first_column,
        total_columns=buffers.columns,
        weight_dtype=_DTYPES[weight.dtype],
        scale_dtype=_SCALE_DTYPES[spec.scale_dtype],
        bits=spec.bits,
        symmetric=spec.symmetric,
        method=_METHODS[method],
        layout=_LAYOUTS[buffers.layout],
        isa=ISAS.index(isa),
    )
    stats = _Stats()
    status = opened().osl_quantize_tile(ctypes.byref(args), ctypes.byref(stats))
    if status == 2:
        raise MemoryError("no memory for quantizing a tile")
    if status:
        raise RuntimeError(f"quantizing a tile: {_ERRORS.get(status, status)}")
    first = None if stats.first_nonfinite < 0 else stats.first_nonfinite
    return Statistics(stats.sq_error, stats.sq_weight, stats.nonfinite, first)
