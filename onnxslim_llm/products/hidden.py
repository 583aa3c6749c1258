"""The hidden layer before a product: channels that products make, elementwise operators change, and the product sums.

A channel of such a layer can be left out: its columns in the products that make it, its entries in vectors on the way,
its row in the product that sums it. Told from the flow of data; names are never read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.activation import GELU, GELU_TANH, SWISH
from onnxslim_llm.ir.ownership import is_overridable
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.ir.weights.sparse import SparseWeight
from onnxslim_llm.products.reads import (
    QUANTIZED,
    k_axis_of,
    product_reason,
    quantized_operand,
    quantized_source,
    read_weight,
)
from onnxslim_llm.rewrite.constants import constant_tensor
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.passes import Change

__all__ = ["ChannelConstant", "HiddenLayer", "find_hidden_layers"]

#: Each element of the result depends on the elements in its place alone.
_ELEMENTWISE = frozenset(
    {
        *(
            "Abs",
            "Add",
            "Cast",
            "Celu",
            "Clip",
            "Div",
            "Elu",
            "Erf",
            "Exp",
            "Gelu",
            "HardSigmoid",
            "HardSwish",
            "Identity",
        ),
        *(
            "LeakyRelu",
            "Log",
            "Max",
            "Min",
            "Mish",
            "Mul",
            "Neg",
            "Pow",
            "Reciprocal",
            "Relu",
            "Selu",
            "Sigmoid",
            "Softplus",
        ),
        *("Softsign", "Sqrt", "Sub", "Swish", "Tanh", "ThresholdedRelu"),
    }
)
_ACTIVATIONS = (GELU, GELU_TANH, SWISH)
_FLOATS = ("float32", "float16", "bfloat16")
_BIAS = 2


@dataclass(frozen=True)
class ChannelConstant:
    """A constant with an entry for each hidden channel along one axis.

    Attributes:
        constant: A weight whose columns make the channels, or a vector on the way.
        axis: The axis.
        offset: Where the first channel lies on it: gate and up may lie side by side in one weight.
    """

    constant: gs.Constant
    axis: int
    offset: int = 0


@dataclass
class HiddenLayer:
    """The channels that one product sums.

    Attributes:
        product: The MatMul or Gemm that sums them.
        weight: Its weight.
        k_axis: The axis of the weight that is summed over.
        size: Number of channels.
        makers: The constants of what makes them.
        tensors: The activations [..., size] between.
        splits: Split nodes that part gate and up; each of their outputs has `size` channels.
    """

    product: gs.Node
    weight: gs.Constant
    k_axis: int
    size: int
    makers: list[ChannelConstant] = field(default_factory=list)
    tensors: list[gs.Variable] = field(default_factory=list)
    splits: list[gs.Node] = field(default_factory=list)


def find_hidden_layers(model: Model, change: Change) -> list[HiddenLayer]:
    """Return the hidden layers of the top graph, in order; `change` is told which products have none, and why."""
    outputs = graph_output_ids(model)
    uses: Counter[Hashable] = Counter(weight_of(c).storage_key for c in model.constants())
    found = []
    for node in model.graph.nodes:
        if (codes := quantized_operand(node)) is not None:
            change.skip(codes.name, QUANTIZED)
        if normal_domain(node.domain) != "" or node.op not in ("MatMul", "Gemm") or len(node.inputs) < 2:
            continue
        read = read_weight(node.inputs[1])
        if read is None and (codes := quantized_source(node.inputs[1])) is not None:
            change.skip(codes.name, QUANTIZED)
        if read is None or len(weight_of(read.constant).shape) != 2 or product_reason(node, weight_of(read.constant)):
            continue
        if read.in_node:
            change.skip(read.constant.name, "it lies in a Constant node: clean the model up first")
            continue
        k_axis = k_axis_of(node, read.transposed)
        size = weight_of(read.constant).shape[k_axis]
        walk = _Walk(outputs, uses, HiddenLayer(node, read.constant, k_axis, size))
        reason = walk.constant_reason(read.constant) or walk.run()
        if reason:
            change.skip(read.constant.name, reason)
        elif not _read_once(node.inputs[1]):
            change.skip(read.constant.name, "it has several uses")
        else:
            found.append(walk.layer)
    return found


def _read_once(tensor: gs.Tensor) -> bool:
    """Return whether a weight, and what carries it to its product, has one reader."""
    while isinstance(tensor, gs.Variable) and tensor.inputs:
        if len(tensor.outputs) != 1:
            return False
        tensor = tensor.inputs[0].inputs[0]
    return len(tensor.outputs) == 1


class _Walk:
    """From the input of a product back to what makes it."""

    def __init__(self, outputs: set[int], uses: Counter[Hashable], layer: HiddenLayer) -> None:
        self.outputs, self.uses, self.layer = outputs, uses, layer
        self.inside: set[int] = {id(layer.product)}

    def run(self) -> str:
        """Fill the layer; return why that cannot be done, or nothing."""
        stack: list[gs.Tensor] = [self.layer.product.inputs[0]]
        seen: set[int] = set()
        while stack:
            tensor = stack.pop()
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if not isinstance(tensor, gs.Variable) or not tensor.inputs:
                return "an input of the model reaches it without a product"
            if id(tensor) in self.outputs:
                return f"'{tensor.name}' is an output of the model"
            self.layer.tensors.append(tensor)
            reason = self._node(tensor.inputs[0], tensor, stack)
            if reason:
                return reason
        for tensor in self.layer.tensors:
            other = next((n for n in tensor.outputs if id(n) not in self.inside), None)
            if other is not None:
                return f"{other.op} '{other.name or other.outputs[0].name}' reads '{tensor.name}', too"
        return "" if self.layer.makers else "no product makes its input"

    def constant_reason(self, constant: gs.Constant) -> str:
        """Return why entries of a constant cannot be left out, or nothing."""
        weight = weight_of(constant)
        if is_overridable(constant) or id(constant) in self.outputs:
            return f"'{constant.name}' is an input or output of the model"
        if isinstance(weight, SparseWeight) or str(weight.dtype) not in _FLOATS:
            return f"'{constant.name}' is no dense float weight"
        if self.uses[weight.storage_key] > 1 or len(constant.outputs) > 1:
            return f"'{constant.name}' has several uses"
        return ""

    def _node(self, node: gs.Node, tensor: gs.Tensor, stack: list[gs.Tensor]) -> str:
        if id(node) in self.inside:
            return ""
        self.inside.add(id(node))
        plain = normal_domain(node.domain) == ""
        if plain and node.op in ("MatMul", "Gemm"):
            return self._maker(node, self.layer.size, 0)
        if plain and node.op == "Split":
            return self._split(node)
        if not (plain and node.op in _ELEMENTWISE) and not any(concept.is_call(node) for concept in _ACTIVATIONS):
            return f"{node.op} '{node.name or tensor.name}' mixes what the product sums, or makes it"
        for read in node.inputs:
            constant = constant_tensor(read)
            if constant is None and isinstance(read, gs.Variable):
                stack.append(read)
            elif constant is not None and (reason := self._vector(constant)):
                return reason
        return ""

    def _vector(self, constant: gs.Constant) -> str:
        shape = weight_of(constant).shape
        if not shape or shape[-1] == 1:
            return "" if weight_of(constant).size == 1 else f"'{constant.name}' has another axis than the channels'"
        if shape[-1] != self.layer.size or weight_of(constant).size != self.layer.size:
            return f"'{constant.name}' of shape {list(shape)} is no vector of {self.layer.size} channels"
        self.layer.makers.append(ChannelConstant(constant, len(shape) - 1))
        return self.constant_reason(constant)

    def _maker(self, node: gs.Node, size: int, parts: int) -> str:
        """Take in the product that makes the channels, or `parts` times as many side by side."""
        read = read_weight(node.inputs[1])
        if read is None or read.in_node or product_reason(node, weight_of(read.constant)):
            return f"{node.op} '{node.name or node.outputs[0].name}' multiplies with no weight"
        weight, axis = weight_of(read.constant), 1 - k_axis_of(node, read.transposed)
        if len(weight.shape) != 2 or weight.shape[axis] != size * max(parts, 1):
            return f"'{read.constant.name}' makes other channels than the product sums"
        constants = [(read.constant, axis)]
        if node.op == "Gemm" and len(node.inputs) > _BIAS and not node.inputs[_BIAS].is_empty():
            bias = constant_tensor(node.inputs[_BIAS])
            if bias is None or weight_of(bias).shape != (size * max(parts, 1),):
                return f"the bias of '{node.name or node.outputs[0].name}' is no vector of its channels"
            constants.append((bias, 0))
        if not _read_once(node.inputs[1]):
            return f"'{read.constant.name}' has several uses"
        for constant, where in constants:
            reason = self.constant_reason(constant)
            if reason:
                return reason
            self.layer.makers += [ChannelConstant(constant, where, size * part) for part in range(max(parts, 1))]
        return ""

    def _split(self, node: gs.Node) -> str:
        """Take in a weight that makes gate and up side by side."""
        if len(node.outputs) != 2 or node.attrs.get("axis", 0) not in (-1, 2):
            return f"Split '{node.name or node.outputs[0].name}' does not part the channels into two halves"
        packed = node.inputs[0]
        made = packed.inputs[0] if isinstance(packed, gs.Variable) and packed.inputs else None
        if made is None or normal_domain(made.domain) != "" or made.op not in ("MatMul", "Gemm"):
            return f"what Split '{node.name or node.outputs[0].name}' parts comes from no product"
        if len(packed.outputs) != 1 or id(packed) in self.outputs:
            return f"'{packed.name}' is read elsewhere, too"
        if len(node.inputs) > 1 and constant_tensor(node.inputs[1]) is None:
            return f"the sizes of Split '{node.name or node.outputs[0].name}' are not constant"
        self.layer.tensors += [packed, *(t for t in node.outputs if t not in self.layer.tensors)]
        self.layer.splits.append(node)
        self.inside.add(id(made))
        return self._maker(made, self.layer.size, 2)
