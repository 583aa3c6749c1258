"""How a node reads a matrix: the constant behind its input, the orientation, and what speaks against quantizing it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxslim_llm.ir.weights import dtypes, weight_of
from onnxslim_llm.ir.weights.weight import Weight
from onnxslim_llm.rewrite.schema import normal_domain

__all__ = [
    "QUANTIZED",
    "WeightRead",
    "gather_reason",
    "k_axis_of",
    "product_reason",
    "quantized_operand",
    "quantized_source",
    "read_weight",
]

#: Operators that compute with codes, and which input these are.
_CODES = {
    ("", "MatMulInteger"): 1,
    ("", "QLinearMatMul"): 3,
    ("com.microsoft", "DynamicQuantizeMatMul"): 1,
    ("com.microsoft", "GatherBlockQuantized"): 0,
    ("com.microsoft", "MatMulIntegerToFloat"): 1,
    ("com.microsoft", "MatMulNBits"): 1,
}
#: Why a weight that `quantized_source` or `quantized_operand` finds is left alone.
QUANTIZED = "it is quantized already"


@dataclass(frozen=True)
class WeightRead:
    """How a node input comes from a constant, through Transpose, Cast and Identity nodes.

    Attributes:
        constant: The constant.
        transposed: Whether an odd number of Transpose nodes lies between.
        dtype: Element type at the node.
        in_node: Whether a Constant node holds it, instead of an initializer.
    """

    constant: gs.Constant
    transposed: bool
    dtype: str
    in_node: bool


def read_weight(tensor: gs.Tensor) -> WeightRead | None:
    """Return how `tensor` comes from a constant, or None if it does not."""
    transposed, dtype, in_node = False, "", False
    while isinstance(tensor, gs.Variable):
        if len(tensor.inputs) != 1 or normal_domain(tensor.inputs[0].domain) != "":
            return None
        node = tensor.inputs[0]
        if node.op == "Constant" and isinstance(node.attrs.get("value"), gs.Constant):
            tensor, in_node = node.attrs["value"], True
            break
        if node.op == "Cast":
            dtype = dtype or str(dtypes.numpy_dtype(dtypes.onnx_dtype(node.attrs["to"])))
        elif node.op == "Transpose":
            perm = node.attrs.get("perm")
            if perm is not None and list(perm) != [1, 0]:
                return None
            transposed = not transposed
        elif node.op != "Identity":
            return None
        tensor = node.inputs[0]
    if not isinstance(tensor, gs.Constant):
        return None
    weight = weight_of(tensor)
    if transposed and len(weight.shape) != 2:
        return None
    return WeightRead(tensor, transposed, dtype or str(weight.dtype), in_node)


def quantized_source(tensor: gs.Tensor) -> gs.Tensor | None:
    """Return the codes that `tensor` is dequantized from, or None if it is not."""
    while isinstance(tensor, gs.Variable) and len(tensor.inputs) == 1:
        producer = tensor.inputs[0]
        if producer.op == "DequantizeLinear":
            return producer.inputs[0]
        if producer.op not in ("Transpose", "Cast", "Identity", "Reshape"):
            return None
        tensor = producer.inputs[0]
    return None


def quantized_operand(node: gs.Node) -> gs.Tensor | None:
    """Return the codes that a product or look-up with quantized weights holds, or None if it is none of these."""
    index = _CODES.get((normal_domain(node.domain), node.op))
    return node.inputs[index] if index is not None and len(node.inputs) > index else None


def k_axis_of(node: gs.Node, transposed: bool) -> int:
    """Return the axis of the constant that a product sums over, or the embedding axis of a table."""
    stored_nk = node.op == "Gather" or (node.op == "Gemm" and bool(node.attrs.get("transB", 0)))
    return int(stored_nk != transposed)


def product_reason(node: gs.Node, weight: Weight) -> str:
    """Return why the weight of a MatMul or Gemm cannot be quantized, or nothing."""
    if len(weight.shape) > 2:
        return f"it has {len(weight.shape)} dimensions: batched weights are left as they are"
    if node.op == "Gemm" and node.attrs.get("transA", 0):
        return "Gemm transposes the other operand (transA = 1)"
    return ""


def gather_reason(node: gs.Node, weight: Weight) -> str:
    """Return why the table of a Gather cannot be quantized, or nothing."""
    if any(reader.op == "DequantizeLinear" for tensor in node.outputs for reader in _readers(tensor)):
        return "it holds the scales or zero points of a quantized table"
    if len(weight.shape) != 2:
        return f"a table of {len(weight.shape)} dimensions"
    if node.attrs.get("axis", 0) % 2 != 0:
        return "Gather looks up columns, not rows"
    shape = node.inputs[1].shape
    if shape is None:
        return "the rank of the indices is unknown"
    if not shape:  # a constant row, and ONNX Runtime takes the scale of a single block for one of the whole tensor
        return "Gather looks up a single row"
    return ""


def _readers(tensor: gs.Tensor) -> Iterator[gs.Node]:
    for node in tensor.outputs:
        if node.op in ("Cast", "Unsqueeze", "Reshape"):
            yield from _readers(node.outputs[0])
        yield node
