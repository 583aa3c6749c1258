"""The kinds of weights in one place, and how constants hold them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from onnxslim_llm.ir.weights import dtypes
from onnxslim_llm.ir.weights.concat import ConcatWeight
from onnxslim_llm.ir.weights.jobs import DerivedWeight
from onnxslim_llm.ir.weights.mapping import MappedFile
from onnxslim_llm.ir.weights.sparse import SparseWeight
from onnxslim_llm.ir.weights.stored import ArrayWeight, MappedWeight, ProtoWeight
from onnxslim_llm.ir.weights.views import AliasWeight, ViewWeight
from onnxslim_llm.ir.weights.weight import Weight

__all__ = [
    "AliasWeight",
    "ArrayWeight",
    "ConcatWeight",
    "DerivedWeight",
    "MappedFile",
    "MappedWeight",
    "ProtoWeight",
    "SparseWeight",
    "ViewWeight",
    "Weight",
    "constant",
    "weight_of",
]


def weight_of(tensor: gs.Constant) -> Weight:
    """Return what a constant holds, without loading it.

    Arrays and graphsurgeon's own lazy values that a user put there come back wrapped, without a copy; an array gets a
    new wrapper at every call.

    Raises:
        TypeError: The constant holds something else, or an array of a type that ONNX does not have.
    """
    values = tensor._values
    if isinstance(values, Weight):
        return values
    if isinstance(values, SparseValues):
        proto = values.tensor
        return SparseWeight(proto, ProtoWeight(proto.values), ProtoWeight(proto.indices))
    if isinstance(values, LazyValues):
        return ProtoWeight(values.tensor)
    if not isinstance(values, np.ndarray | np.generic | int | float | bool | list | tuple):
        raise TypeError(f"constant '{tensor.name}' holds a {type(values).__name__}, not an array")
    array = np.asarray(values)
    wanted = tensor._export_dtype
    if wanted is not None and dtypes.onnx_dtype(wanted) != dtypes.onnx_dtype(array.dtype):
        array = array.astype(dtypes.numpy_dtype(dtypes.onnx_dtype(wanted)))
    return ArrayWeight(array)


def constant(name: str, content: Weight | TensorProto | Any) -> gs.Constant:
    """Make a constant from a weight, a TensorProto, or anything that numpy makes an array of."""
    if isinstance(content, TensorProto):
        content = ProtoWeight(content)
    return gs.Constant(name, content if isinstance(content, Weight) else np.asarray(content))
