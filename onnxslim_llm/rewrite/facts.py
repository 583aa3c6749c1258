"""What rules ask about tensors: shapes and types as inference has written them."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxslim_llm.ir.shapes import shape_of
from onnxslim_llm.ir.weights import dtypes, weight_of

__all__ = ["known_shape", "onnx_type", "rank_of", "same_shape"]


def known_shape(tensor: gs.Tensor) -> tuple[int, ...] | None:
    """Return the shape if every dimension is a number, or None."""
    shape = shape_of(tensor)
    if shape is None:
        return None
    numbers = tuple(dim for dim in shape if isinstance(dim, int))
    return numbers if len(numbers) == len(shape) else None


def rank_of(tensor: gs.Tensor) -> int | None:
    """Return the number of axes, or None if it is not known."""
    shape = shape_of(tensor)
    return None if shape is None else len(shape)


def onnx_type(tensor: gs.Tensor) -> int | None:
    """Return the element type (`TensorProto.DataType`), or None if it is not known."""
    if isinstance(tensor, gs.Constant):
        return weight_of(tensor).onnx_dtype
    return None if tensor.dtype is None else dtypes.onnx_dtype(tensor.dtype)


def same_shape(a: gs.Tensor, b: gs.Tensor) -> bool:
    """Return whether two tensors have the same, completely known shape."""
    left, right = shape_of(a), shape_of(b)
    return left is not None and left == right and all(d is not None and d != "" for d in left)
