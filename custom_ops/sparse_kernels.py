"""ctypes binding of the sparse packed weights; the interface is src/interface/onnxslim_matmul.h.

Products with them are :func:`kernels.matmul`, which takes either form.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim_llm.custom_ops import native
from onnxslim_llm.custom_ops.kernels import ISAS

__all__ = ["expand", "make_sparse", "sparse_bytes", "stored_values"]

Array = npt.NDArray[Any]


@cache
def _library() -> ctypes.CDLL:
    library = native.opened()
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    for name in ("osl_sparse_bytes", "osl_expanded_bytes", "osl_sparse_values"):
        getattr(library, name).restype = count
        getattr(library, name).argtypes = (pointer, count)
    library.osl_make_sparse.argtypes = (pointer, count, count, pointer)
    library.osl_expand_weight.argtypes = (pointer, count, ctypes.c_int32, pointer)
    for name in ("osl_make_sparse", "osl_expand_weight"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def _raise(error: bytes | None) -> None:
    if error is not None:
        raise ValueError(error.decode())


def sparse_bytes(packed: Array) -> int:
    """Bytes of the sparse form of a packed weight.

    Raises:
        ValueError: the bytes are no packed weight, or one of 2 or 3 bits.
    """
    packed = np.ascontiguousarray(packed)
    found = int(_library().osl_sparse_bytes(packed.ctypes.data, packed.size))
    if found < 0:
        raise ValueError("these bytes are not a packed weight of 4 or 8 bits")
    return found


def make_sparse(packed: Array) -> npt.NDArray[np.uint8]:
    """The native counterpart of :func:`sparse.make_sparse`.

    Raises:
        ValueError: the bytes are no packed weight.
    """
    packed = np.ascontiguousarray(packed)
    made = np.empty(sparse_bytes(packed), np.uint8)
    _raise(_library().osl_make_sparse(packed.ctypes.data, packed.size, made.size, made.ctypes.data))
    return made


def stored_values(sparse: Array) -> int:
    """How many codes a sparse packed weight holds.

    Raises:
        ValueError: the bytes are no sparse packed weight.
    """
    sparse = np.ascontiguousarray(sparse)
    found = int(_library().osl_sparse_values(sparse.ctypes.data, sparse.size))
    if found < 0:
        raise ValueError("these bytes are not a sparse packed weight")
    return found


def expand(sparse: Array, isa: str = "auto") -> npt.NDArray[np.uint8]:
    """The native counterpart of :func:`sparse.expand`.

    Raises:
        ValueError: the bytes are no sparse packed weight, or this machine lacks the instruction set.
    """
    sparse = np.ascontiguousarray(sparse)
    size = int(_library().osl_expanded_bytes(sparse.ctypes.data, sparse.size))
    made = np.empty(max(size, 0), np.uint8)
    _raise(_library().osl_expand_weight(sparse.ctypes.data, sparse.size, ISAS.index(isa), made.ctypes.data))
    return made
