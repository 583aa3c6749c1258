"""Comparing the contents of weights: a sample first, then piece by piece, so that nothing large is held."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from onnxslim_llm.ir.weights import DerivedWeight, Weight, dtypes

__all__ = ["equal_content", "equal_transposed", "fingerprint", "is_readable"]

#: Elements (or packed bytes) of a tensor that its fingerprint looks at, spread evenly, first and last included.
_SAMPLES = 64
#: Rows compared at a time: a row of the transposed tensor then gives whole pages of memory.
_ROWS = 2048
_BYTE = 8


def is_readable(weight: Weight) -> bool:
    """Return whether the content is there to be compared: no strings or unknown types, nor work still to be done."""
    dtype = dtypes.numpy_dtype(weight.onnx_dtype)
    return dtype is not None and dtype.kind != "O" and not isinstance(weight.storage, DerivedWeight)


def fingerprint(weight: Weight, transposed: bool = False) -> bytes:
    """Return a few bytes that equal contents have in common, and different ones seldom; reads a few pages at most.

    Args:
        weight: Any weight.
        transposed: Return what the transposed weight would give. Only for weights of whole bytes.
    """
    if weight.onnx_dtype == TensorProto.STRING:
        return weight.digest()
    if not is_readable(weight) or not weight.nbytes:
        return b""
    if dtypes.bits_of(weight.onnx_dtype) % _BYTE:
        sample = np.frombuffer(weight.raw(), np.uint8)[_places(weight.nbytes, _SAMPLES)]
    else:
        view = weight.view()
        sample = view[np.ix_(*_grid(view.shape))] if view.ndim else view
        sample = sample.T if transposed else sample
    found = hashlib.sha256(np.ascontiguousarray(sample).tobytes()).digest()
    weight.release()
    return found


def equal_content(a: Weight, b: Weight) -> bool:
    """Return whether two weights of the same type and shape hold the same bytes."""
    if a.key == b.key:
        return True
    if a.onnx_dtype == TensorProto.STRING:
        return a.digest() == b.digest()
    if not is_readable(a) or not is_readable(b):
        return False
    for (start, mine), (also, theirs) in zip(a.chunks(), b.chunks(), strict=False):
        mine, theirs = memoryview(mine).cast("B"), memoryview(theirs).cast("B")
        if start != also or len(mine) != len(theirs):
            return a.digest() == b.digest()  # cut into other pieces
        if mine != theirs:
            return False
        a.release(start, start + len(mine))
        b.release(start, start + len(theirs))
    return True


def equal_transposed(a: Weight, b: Weight) -> bool:
    """Return whether the matrix `b` [N, K] holds the same bits as `a` [K, N] transposed; the types must be equal."""
    if not is_readable(a) or not is_readable(b) or dtypes.bits_of(a.onnx_dtype) % _BYTE:
        return False
    bits = np.dtype(f"u{dtypes.bits_of(a.onnx_dtype) // _BYTE}")
    left, right = a.view().view(bits), b.view().view(bits)
    sample = np.ix_(*_grid(left.shape))
    if not np.array_equal(left[sample], right[np.ix_(*_grid(right.shape))].T):
        return False
    row_bytes = a.nbytes // a.shape[0]
    for start in range(0, a.shape[0], _ROWS):
        stop = min(start + _ROWS, a.shape[0])
        if not np.array_equal(left[start:stop], right[:, start:stop].T):
            return False
        a.release(start * row_bytes, stop * row_bytes)
        b.release()
    return True


def _grid(shape: tuple[int, ...]) -> list[NDArray[np.int64]]:
    """Return indices along each axis whose grid has about `_SAMPLES` points."""
    each = max(2, round(_SAMPLES ** (1 / max(1, len(shape)))))
    return [_places(size, each) for size in shape]


def _places(size: int, count: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, size - 1, min(size, count)).astype(np.int64))
