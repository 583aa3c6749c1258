"""Constants as rules see them: through Constant nodes, Identity and Cast chains, whatever the exporter wrote."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper

from onnxslim_llm.ir.ownership import is_overridable
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.rewrite.schema import normal_domain

__all__ = ["SMALL_ELEMENTS", "constant_tensor", "constant_value", "is_constant"]

#: Larger constants are weights: rules do not read their values.
SMALL_ELEMENTS = 65_536

_SCALAR_ATTRIBUTES = {"value_float": np.float32, "value_int": np.int64}
_LIST_ATTRIBUTES = {"value_floats": np.float32, "value_ints": np.int64}


def constant_tensor(tensor: gs.Tensor) -> gs.Constant | None:
    """Return the initializer behind `tensor`, seen through Identity nodes and Constant nodes that hold a tensor."""
    while isinstance(tensor, gs.Variable):
        if len(tensor.inputs) != 1:
            return None
        node = tensor.inputs[0]
        if normal_domain(node.domain) != "":
            return None
        if node.op == "Identity":
            tensor = node.inputs[0]
        elif node.op == "Constant" and isinstance(node.attrs.get("value"), gs.Constant):
            return node.attrs["value"]
        else:
            return None
    return tensor if isinstance(tensor, gs.Constant) and not is_overridable(tensor) else None


def is_constant(tensor: gs.Tensor) -> bool:
    """Return whether the value is known at compile time (of any size)."""
    return constant_tensor(tensor) is not None or constant_value(tensor) is not None


def constant_value(tensor: gs.Tensor, limit: int = SMALL_ELEMENTS) -> NDArray[Any] | None:
    """Return the value of a small constant, or None.

    Args:
        tensor: Any tensor of the graph.
        limit: Largest number of elements that is read.
    """
    if isinstance(tensor, gs.Constant):
        if is_overridable(tensor):
            return None
        weight = weight_of(tensor)
        return weight.load() if int(np.prod(weight.shape, dtype=np.int64)) <= limit else None
    if not isinstance(tensor, gs.Variable) or len(tensor.inputs) != 1:
        return None
    node = tensor.inputs[0]
    if normal_domain(node.domain) != "":
        return None
    if node.op == "Identity":
        return constant_value(node.inputs[0], limit)
    if node.op == "Cast":
        value = constant_value(node.inputs[0], limit)
        to = node.attrs.get("to")
        if value is None or to is None:
            return None
        dtype = helper.tensor_dtype_to_np_dtype(to) if isinstance(to, int) else np.dtype(to)
        return value.astype(dtype)
    if node.op == "Constant":
        for name, value in node.attrs.items():
            if isinstance(value, gs.Constant):
                return constant_value(value, limit)
            if name in _SCALAR_ATTRIBUTES:
                return np.array(value, _SCALAR_ATTRIBUTES[name])
            if name in _LIST_ATTRIBUTES and len(value) <= limit:
                return np.array(value, _LIST_ATTRIBUTES[name])
    return None
