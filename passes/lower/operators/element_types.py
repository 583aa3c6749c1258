"""Element types behind operators that the onnx package does not know."""

from __future__ import annotations

import onnx_graphsurgeon as gs
from onnx import defs

from onnxslim_llm.ir.weights import dtypes
from onnxslim_llm.rewrite.schema import normal_domain, schema_of

__all__ = ["element_type"]

#: com.microsoft's operators whose first output has the type of this input.
_TYPE_OF_INPUT = {
    "GatherBlockQuantized": 2,
    **dict.fromkeys(
        (
            *("Attention", "GroupQueryAttention", "MultiHeadAttention", "RotaryEmbedding"),
            *("BiasGelu", "FastGelu", "Gelu", "QuickGelu"),
            *("LayerNormalization", "SimplifiedLayerNormalization"),
            *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
            *("FusedMatMul", "MatMulNBits"),
        ),
        0,
    ),
}
_OPSET = defs.onnx_opset_version()  # of the schemas that are asked whether a type is passed through; they agree in this


def element_type(tensor: gs.Tensor) -> int | None:
    """Return the TensorProto.DataType of a tensor: its own, or that of what it is computed from; None if unknown."""
    seen: set[int] = set()
    while tensor.dtype is None:
        if id(tensor) in seen or not isinstance(tensor, gs.Variable) or len(tensor.inputs) != 1:
            return None
        seen.add(id(tensor))
        node = tensor.inputs[0]
        index = _source(node, next(i for i, made in enumerate(node.outputs) if made is tensor))
        if index is None or index >= len(node.inputs):
            return None
        tensor = node.inputs[index]
    return dtypes.onnx_dtype(tensor.dtype)


def _source(node: gs.Node, output: int) -> int | None:
    """Return the input that has the type of an output."""
    if normal_domain(node.domain) == "com.microsoft":
        return _TYPE_OF_INPUT.get(node.op) if output == 0 or node.op.startswith("Skip") else None
    schema = schema_of(node.op, normal_domain(node.domain), _OPSET)
    if schema is None or not schema.outputs:
        return None
    wanted = schema.outputs[min(output, len(schema.outputs) - 1)].type_str
    return next((i for i, formal in enumerate(schema.inputs) if formal.type_str == wanted), None)
