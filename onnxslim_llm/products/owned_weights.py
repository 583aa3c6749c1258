"""Weights that belong to one reader alone, and so can be changed together with what is around it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from onnxslim_llm.ir.ownership import is_overridable
from onnxslim_llm.ir.weights import constant, weight_of
from onnxslim_llm.ir.weights.sparse import SparseWeight
from onnxslim_llm.ir.weights.weight import Weight
from onnxslim_llm.products.reads import k_axis_of, product_reason, read_weight
from onnxslim_llm.products.transform_job import Step, transformed
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["Constants", "Product"]

_FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Product:
    """A MatMul or Gemm with a matrix of weights that nothing else reads.

    Attributes:
        node: The product.
        constant: The weight.
        k_axis: The axis of the stored weight that is summed over.
    """

    node: gs.Node
    constant: gs.Constant
    k_axis: int

    @property
    def name(self) -> str:
        """Name of the weight."""
        return str(self.constant.name)

    @property
    def weight(self) -> Weight:
        """The weight as it is now."""
        return weight_of(self.constant)

    @property
    def rows(self) -> int:
        """K."""
        return int(self.weight.shape[self.k_axis])

    @property
    def columns(self) -> int:
        """N."""
        return int(self.weight.shape[1 - self.k_axis])

    def change(self, *steps: Step) -> None:
        """Record work on the weight."""
        self.constant.values = transformed(self.weight, self.name, *steps)


class Constants:
    """Which constants belong to one reader alone."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.outputs = graph_output_ids(model)
        self._uses: Counter[Hashable] = Counter(weight_of(c).storage_key for c in model.constants())

    def product(self, node: gs.Node) -> Product | str:
        """Return the product that `node` is, or why its weight cannot be changed; an empty string if it is none."""
        if normal_domain(node.domain) != "" or node.op not in ("MatMul", "Gemm") or len(node.inputs) < 2:
            return ""
        read = read_weight(node.inputs[1])
        if read is None:
            return ""
        weight = weight_of(read.constant)
        reason = product_reason(node, weight) or self.matrix_reason(read.constant)
        if read.in_node:
            reason = "its weight lies in a Constant node: clean the model up first"
        if len(weight.shape) != 2 or not self._alone(node.inputs[1], node):
            reason = reason or f"'{read.constant.name}' is used elsewhere, too"
        return reason or Product(node, read.constant, k_axis_of(node, read.transposed))

    def matrix_reason(self, tensor: gs.Constant) -> str:
        """Return why a weight cannot be changed, or nothing."""
        weight = weight_of(tensor)
        if is_overridable(tensor) or id(tensor) in self.outputs:
            return f"'{tensor.name}' is an input or output of the model"
        if isinstance(weight, SparseWeight) or str(weight.dtype) not in _FLOATS:
            return f"'{tensor.name}' is no dense float weight"
        if self._uses[weight.storage_key] > 1:
            return f"'{tensor.name}' is stored once for several uses"
        return ""

    def _alone(self, tensor: gs.Tensor, reader: gs.Node) -> bool:
        """Return whether `reader` is all that reads a weight, through whatever carries it."""
        while True:
            if len(tensor.outputs) != 1 or tensor.outputs[0] is not reader or id(tensor) in self.outputs:
                return False
            if isinstance(tensor, gs.Constant):
                return sum(t is tensor for t in reader.inputs) == 1
            reader = tensor.inputs[0]
            tensor = reader.inputs[0]

    def is_vector(self, tensor: gs.Tensor, size: int) -> bool:
        """Return whether a tensor is a constant float vector of `size` elements that may be replaced."""
        if not isinstance(tensor, gs.Constant) or is_overridable(tensor):
            return False
        weight = weight_of(tensor)
        shape = weight.shape
        flat = bool(shape) and shape[-1] == size == weight.size
        return flat and str(weight.dtype) in _FLOATS and not isinstance(weight, SparseWeight)

    def change(self, node: gs.Node, index: int, *steps: Step) -> None:
        """Record work on a constant that `node` reads; a vector with other readers is copied first."""
        tensor = node.inputs[index]
        if isinstance(tensor, gs.Variable):  # a matrix behind a Transpose, which `product` found to be nobody else's
            read = read_weight(tensor)
            assert read is not None, tensor.name
            tensor = read.constant
            tensor.values = transformed(weight_of(tensor), tensor.name, *steps)
            return
        self.put(node, index, transformed(weight_of(tensor), tensor.name, *steps))

    def put(self, node: gs.Node, index: int, weight: Weight) -> None:
        """Give a constant that `node` reads another value, of another shape perhaps; other readers keep the old one."""
        tensor = node.inputs[index]
        if len(tensor.outputs) == 1 and id(tensor) not in self.outputs:
            tensor.values = weight
        else:
            node.inputs[index] = constant(self.model.fresh_name(f"{tensor.name}_changed"), weight)
