"""Gelu and Swish as operators."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.concepts.activation import GELU, GELU_TANH
from onnxslim_llm.ir.shapes import shape_of
from onnxslim_llm.rewrite.constants import constant_tensor
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.facts import known_shape, onnx_type
from onnxslim_llm.rewrite.schema import normal_domain

__all__ = ["GELU_OPSET", "SWISH_OPSET", "bias_gelu", "gelu", "quick_gelu", "swish", "swish_product"]

GELU_OPSET, SWISH_OPSET = 20, 24
_CONTRIB = "com.microsoft"
#: What ONNX Runtime's own operators have kernels for.
_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16)
#: Operators with a bias input.
_BIASED = {GELU.name: "BiasGelu", GELU_TANH.name: "FastGelu"}


def gelu(op: Builder, call: gs.Node) -> Sequence[gs.Tensor] | None:
    """Return a Gelu, from opset 20 on; ONNX Runtime's own Gelu and FastGelu are no faster."""
    if (op.model.opset() or 0) < GELU_OPSET:
        return None
    return [op.Gelu(call.inputs[0], approximate="tanh" if GELU_TANH.is_call(call) else None)]


def bias_gelu(op: Builder, call: gs.Node, graph_outputs: set[int]) -> Sequence[gs.Tensor] | None:
    """Return a BiasGelu or FastGelu that adds a bias first, or else a Gelu.

    As fast as Add and Gelu, which ONNX Runtime fuses like that itself: it saves the session the work.
    """
    x = call.inputs[0]
    split = _split_bias(x, graph_outputs) if onnx_type(x) in _TYPES else None
    if split is None:
        return gelu(op, call)
    value, bias = split
    return [op.call(_CONTRIB, _BIASED[call.op], value, bias)]


def _split_bias(x: gs.Tensor, graph_outputs: set[int]) -> tuple[gs.Tensor, gs.Tensor] | None:
    """Return (value, bias) if x = value + bias with a bias [D], and nothing else reads x."""
    if not isinstance(x, gs.Variable) or len(x.inputs) != 1 or len(x.outputs) != 1 or id(x) in graph_outputs:
        return None
    node = x.inputs[0]
    if node.op != "Add" or normal_domain(node.domain) != "":
        return None
    for value, bias in (node.inputs, reversed(list(node.inputs))):
        shape = shape_of(value)
        fits = shape and constant_tensor(bias) is not None and known_shape(bias) == shape[-1:]
        if fits and onnx_type(bias) == onnx_type(value):
            return value, bias
    return None


def swish(op: Builder, call: gs.Node) -> Sequence[gs.Tensor] | None:
    """Return a Swish, from opset 24 on."""
    if (op.model.opset() or 0) < SWISH_OPSET:
        return None
    return [op.Swish(call.inputs[0], alpha=float(call.attrs["alpha"]))]


def swish_product(op: Builder, call: gs.Node) -> Sequence[gs.Tensor] | None:
    """Return x * sigmoid(alpha * x) for alpha = 1; None, for the body, otherwise.

    ONNX Runtime 1.31 has no kernel for Swish and takes 2 to 6 times as long with it as with this product, which it
    fuses (benchmarks/fusion/operators.py).
    """
    if float(call.attrs["alpha"]) != 1.0:
        return None
    x = call.inputs[0]
    return [op.Mul(x, op.Sigmoid(x))]


def quick_gelu(op: Builder, call: gs.Node) -> Sequence[gs.Tensor] | None:
    """Return ONNX Runtime's QuickGelu, which is x * sigmoid(alpha * x) for any alpha.

    Same bits as Mul and Sigmoid in the same time; see `swish_product` for Swish.
    """
    if onnx_type(call.inputs[0]) not in _TYPES:
        return swish_product(op, call)
    return [op.call(_CONTRIB, "QuickGelu", call.inputs[0], alpha=float(call.attrs["alpha"]))]
