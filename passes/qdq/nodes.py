"""Which nodes a target computes on integers, and which of their tensors those are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.ir.ownership import is_overridable
from onnxslim_llm.ir.weights import ViewWeight, Weight, weight_of
from onnxslim_llm.products.reads import read_weight
from onnxslim_llm.rewrite.facts import onnx_type
from onnxslim_llm.rewrite.schema import normal_domain
from onnxslim_llm.targets.qdq_rules import QdqRules, QuantizedOp

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.passes import Change

__all__ = ["FLOATS", "QdqNode", "find_nodes", "has_blocked_weight", "is_dequantized", "weight_axis"]

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
#: A sum of so many products of 8-bit codes may leave int32: 2^31 / (255 * 127).
_LONGEST_SUM = 66_000
_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_QUANTIZE = "QuantizeLinear"
_DEQUANTIZE = "DequantizeLinear"


@dataclass
class QdqNode:
    """A node of the top graph that is computed on integers.

    Attributes:
        node: The node.
        rule: Of its operator.
        inputs: Positions that come quantized, without those that are dequantized already.
        results: Positions of the outputs that are rounded, without those that are quantized already.
        weight: What is behind the weight input, in the node's own layout; None if it is computed or quantized already.
        weight_name: Name of its constant.
    """

    node: gs.Node
    rule: QuantizedOp
    inputs: list[int]
    results: list[int]
    weight: Weight | None = None
    weight_name: str = ""

    @property
    def label(self) -> str:
        """What the node is called in messages."""
        return str(self.node.name or self.node.outputs[0].name)

    @property
    def is_product(self) -> bool:
        """Whether it multiplies with a weight or with another activation."""
        return self.rule.weight is not None and self.node.op in _PRODUCTS


@dataclass
class _Search:
    model: Model
    rules: QdqRules
    weights: bool
    exclude: Sequence[re.Pattern[str]]
    change: Change
    found: list[QdqNode] = field(default_factory=list)

    def visit(self, node: gs.Node) -> None:
        rule = self.rules.rule_of(normal_domain(node.domain), node.op)
        if rule is None or not node.outputs:
            return
        reason = self._reason(node, rule)
        if reason:
            self.change.skip(node.name or node.outputs[0].name, reason)
            return
        made = self._made(node, rule)
        if made is not None:
            self.found.append(made)

    def _reason(self, node: gs.Node, rule: QuantizedOp) -> str:
        label = node.name or node.outputs[0].name
        pattern = next((p.pattern for p in self.exclude if p.search(label)), None)
        if pattern is not None:
            return f"it is excluded by '{pattern}'"
        return next((reason for check in self.rules.restrictions if (reason := check(node, self.model))), "")

    def _made(self, node: gs.Node, rule: QuantizedOp) -> QdqNode | None:
        label = node.name or node.outputs[0].name
        weight, name, reason = self._weight(node, rule)
        if reason:
            self.change.skip(label, reason)
            return None
        stored = weight is not None or (rule.weight is not None and _is_quantized_weight(node, rule.weight))
        wanted = _activations(node, rule, stored)
        inputs = [i for i in wanted if self._is_float(node.inputs[i], weight) and not is_dequantized(node.inputs[i])]
        results = []
        if rule.quantized_result:
            results = [i for i, t in enumerate(node.outputs) if self._is_float(t, weight) and not _is_quantized(t)]
        known = any(self._is_float(node.inputs[i], weight) for i in wanted)
        return QdqNode(node, rule, inputs, results, weight, name) if known else None

    def _is_float(self, tensor: gs.Tensor, weight: Weight | None) -> bool:
        if tensor.is_empty():
            return False
        kind = onnx_type(tensor)
        if kind is None:  # behind an operator that onnx has no inference for: a product has its weight's type
            return weight is not None
        return kind in FLOATS

    def _weight(self, node: gs.Node, rule: QuantizedOp) -> tuple[Weight | None, str, str]:
        """Return the constant behind the weight input in the node's layout, its name, and why the node stays float."""
        if rule.weight is None or rule.weight >= len(node.inputs):
            return None, "", ""
        reason = _form_reason(node, rule)
        if reason:
            return None, "", reason
        tensor = node.inputs[rule.weight]
        if _is_quantized_weight(node, rule.weight):
            return None, "", self._stored_reason(tensor)
        read = read_weight(tensor)
        constant = None if read is None else read.constant
        if read is None or constant is None or is_overridable(constant):
            return None, "", "its weight is computed" if rule.needs_weight else ""
        weight = weight_of(constant)
        if str(weight.dtype) not in ("float32", "float16", "bfloat16"):
            return None, "", f"its weight is of type {weight.dtype}"
        if not self.weights:
            return None, "", "its weight stays float by weights = 'float'"
        if read.transposed:
            weight = ViewWeight.transpose(weight)
        if node.op == "MatMul" and len(weight.shape) != 2:
            return None, "", f"its weight has {len(weight.shape)} dimensions"
        longest = _sum_length(node, weight) if node.op in _PRODUCTS else 0
        if longest > _LONGEST_SUM:
            return None, "", f"sums of {longest} products of 8-bit codes may leave int32"
        return weight, constant.name, ""

    def _stored_reason(self, tensor: gs.Tensor) -> str:
        dequantize = tensor.inputs[0]
        kind = TensorProto.DataType.Name(weight_of(dequantize.inputs[0]).onnx_dtype).lower()
        blocked = _block_size(dequantize) > 0
        if kind not in (*self.rules.weights, *(self.rules.blocked_weights if blocked else ())):
            return f"its weight is {kind}, for which the target has kernels of its own that take float activations"
        if blocked and kind not in self.rules.blocked_weights:
            return "its weight has a scale per block, which the target does not multiply with quantized activations"
        return ""


def find_nodes(
    model: Model, rules: QdqRules, *, weights: bool, exclude: Sequence[re.Pattern[str]], change: Change
) -> list[QdqNode]:
    """Return the nodes that are computed on integers, in graph order; `change` is told which are not, and why.

    Nodes that move data are among them only where they lie next to one that computes.

    Args:
        model: Shapes and types inferred.
        rules: Of the target.
        weights: Whether weights that are float may be quantized.
        exclude: Nodes whose name has a match stay float.
        change: The account.
    """
    search = _Search(model, rules, weights, exclude, change)
    for node in model.graph.nodes:
        search.visit(node)
    for graph in model.graphs():
        if graph is not model.graph:
            for node in graph.nodes:
                if rules.rule_of(normal_domain(node.domain), node.op) is not None:
                    change.skip(node.name or node.outputs[0].name, "it lies in a subgraph, which is not observed")
    return attached(search.found, change)


def attached(found: list[QdqNode], change: Change) -> list[QdqNode]:
    """Return the nodes without those that only move data between nodes that stay float."""
    movers = {id(item.node): item for item in found if item.rule.same_scale}
    reached = {id(item.node) for item in found if not item.rule.same_scale}
    queue = [item for item in found if not item.rule.same_scale]
    while queue:
        for neighbour in _neighbours(queue.pop()):
            if id(neighbour) in movers and id(neighbour) not in reached:
                reached.add(id(neighbour))
                queue.append(movers[id(neighbour)])
    for key, item in movers.items():
        if key not in reached:
            change.skip(item.label, "it moves data between nodes that stay float")
    return [item for item in found if id(item.node) in reached]


def is_dequantized(tensor: gs.Tensor) -> bool:
    """Return whether the tensor is the result of a DequantizeLinear node."""
    return _produced_by(tensor, _DEQUANTIZE) is not None


def has_blocked_weight(item: QdqNode) -> bool:
    """Return whether a node multiplies with a stored weight that has a scale for each block."""
    index = item.rule.weight
    if index is None or index >= len(item.node.inputs):
        return False
    dequantize = _produced_by(item.node.inputs[index], _DEQUANTIZE)
    return dequantize is not None and _block_size(dequantize) > 0


def weight_axis(item: QdqNode) -> int:
    """Return the axis of the output channels of a node's weight, in the node's layout."""
    if item.node.op == "Gemm":
        return 0 if item.node.attrs.get("transB", 0) else 1
    if item.node.op == "MatMul" or item.node.op == "ConvTranspose":
        return 1
    return 0


def _activations(node: gs.Node, rule: QuantizedOp, stored: bool) -> list[int]:
    """Return the positions of the inputs that are neither a stored weight nor a bias."""
    positions = list(range(len(node.inputs)) if rule.inputs is None else rule.inputs)
    if rule.weight is not None and rule.weight not in positions:
        positions.append(rule.weight)
    apart = {rule.weight} if stored else set()
    if rule.bias is not None and _is_constant(node, rule.bias):
        apart.add(rule.bias)
    return [i for i in positions if i < len(node.inputs) and i not in apart]


def _neighbours(item: QdqNode) -> Iterator[gs.Node]:
    for i in item.inputs:
        yield from item.node.inputs[i].inputs
    for i in item.results:
        yield from item.node.outputs[i].outputs


def _form_reason(node: gs.Node, rule: QuantizedOp) -> str:
    bias = rule.bias if rule.bias is not None and rule.bias < len(node.inputs) else None
    if bias is not None and not node.inputs[bias].is_empty() and not _is_constant(node, bias):
        return "its bias is computed"
    if node.op == "Gemm" and node.attrs.get("transA", 0):
        return "Gemm transposes its input (transA = 1)"
    if node.op == "Gemm" and float(node.attrs.get("alpha", 1.0)) != 1.0:
        return "Gemm scales its product (alpha)"
    return ""


def _sum_length(node: gs.Node, weight: Weight) -> int:
    axis = 0 if node.op == "MatMul" or not node.attrs.get("transB", 0) else 1
    if node.op in ("MatMul", "Gemm"):
        return weight.shape[axis] if len(weight.shape) == 2 else weight.size
    return weight.size // max(weight.shape[0], 1)


def _block_size(dequantize: gs.Node) -> int:
    return int(dequantize.attrs.get("block_size", 0))


def _is_constant(node: gs.Node, index: int) -> bool:
    if index >= len(node.inputs) or node.inputs[index].is_empty():
        return False
    read = read_weight(node.inputs[index])
    return read is not None and not read.transposed


def _is_quantized_weight(node: gs.Node, index: int) -> bool:
    dequantize = _produced_by(node.inputs[index], _DEQUANTIZE) if index < len(node.inputs) else None
    return dequantize is not None and isinstance(dequantize.inputs[0], gs.Constant)


def _is_quantized(tensor: gs.Tensor) -> bool:
    return any(user.op == _QUANTIZE and user.inputs[0] is tensor for user in tensor.outputs)


def _produced_by(tensor: gs.Tensor, op: str) -> gs.Node | None:
    if isinstance(tensor, gs.Variable) and len(tensor.inputs) == 1 and tensor.inputs[0].op == op:
        return tensor.inputs[0]
    return None
