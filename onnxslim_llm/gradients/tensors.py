"""Contents of weights and inputs as torch tensors, and ONNX element types as torch's."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from onnxslim_llm.errors import ModelError
from onnxslim_llm.gradients.backend import torch
from onnxslim_llm.ir.weights import dtypes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["as_tensor", "onnx_type_of", "torch_type"]

# Floats of 16 bits and fewer are computed in float32: a gradient in their own type would be rounding for the most part.
_TYPES: dict[int, Any] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float32,
    TensorProto.BFLOAT16: torch.float32,
    TensorProto.FLOAT8E4M3FN: torch.float32,
    TensorProto.FLOAT8E5M2: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT64: torch.int64,
    TensorProto.INT32: torch.int32,
    TensorProto.INT16: torch.int16,
    TensorProto.INT8: torch.int8,
    TensorProto.INT4: torch.int8,
    TensorProto.UINT8: torch.uint8,
    TensorProto.UINT4: torch.uint8,
    TensorProto.BOOL: torch.bool,
    TensorProto.UINT16: torch.int32,
    TensorProto.UINT32: torch.int64,
}
# What numpy has no name of its own for is widened to the type that torch computes it in.
_WIDENED: dict[str, type[np.generic]] = {
    "float16": np.float32,
    "bfloat16": np.float32,
    "float8_e4m3fn": np.float32,
    "float8_e5m2": np.float32,
    "int2": np.int8,
    "uint2": np.uint8,
    "int4": np.int8,
    "uint4": np.uint8,
    "uint16": np.int32,
    "uint32": np.int64,
}


def torch_type(onnx_dtype: int) -> Any:
    """Return the torch type that values of an ONNX element type are computed in.

    Args:
        onnx_dtype: A number of TensorProto.DataType.

    Raises:
        ModelError: Torch has none: strings, complex numbers.
    """
    if onnx_dtype not in _TYPES:
        name = dtypes.dtype_name(onnx_dtype)
        raise ModelError(f"gradients cannot be computed through values of type {name}")
    return _TYPES[onnx_dtype]


def onnx_type_of(tensor: Tensor) -> int:
    """Return the ONNX element type of a tensor's own type."""
    return next(number for number, kind in _TYPES.items() if kind is tensor.dtype)


def as_tensor(values: NDArray[Any] | Tensor) -> Tensor:
    """Return an array as a tensor, without a copy where types and layout allow it; a tensor as it is.

    Nobody writes into the result: it may be a mapped file.

    Raises:
        ModelError: Strings.
    """
    if isinstance(values, torch.Tensor):
        return values
    array = np.asarray(values)
    name = array.dtype.name
    wide = _WIDENED.get(name, np.float32 if name.startswith(("float8", "float4")) else None)
    if wide is not None:
        array = array.astype(wide)
    if array.dtype.kind not in "biufc":
        raise ModelError(f"gradients cannot be computed through values of type {name}")
    if not array.flags.aligned or min(array.strides, default=0) < 0:
        array = array.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "not writable": nobody writes
        return torch.from_numpy(array)
