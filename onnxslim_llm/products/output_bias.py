"""The vector that is added to the results of a product: finding it, or adding one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_graphsurgeon as gs

from onnxslim_llm.ir.weights.weight import Weight
from onnxslim_llm.products.owned_weights import Constants
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["add_vector", "added_vector"]


def added_vector(constants: Constants, node: gs.Node, columns: int) -> tuple[gs.Node, int] | None:
    """Return the Add behind a product and which of its inputs is a constant vector; None if there is none."""
    result = node.outputs[0]
    if len(result.outputs) != 1 or id(result) in constants.outputs:
        return None
    add = result.outputs[0]
    if add.op != "Add" or normal_domain(add.domain) != "":
        return None
    index = 1 if add.inputs[0] is result else 0
    return (add, index) if constants.is_vector(add.inputs[index], columns) else None


def add_vector(model: Model, node: gs.Node, bias: Weight) -> None:
    """Add `bias` [N] to what `node` of the top graph makes; the result keeps its name."""
    result: Any = node.outputs[0]
    op = Builder(model, f"{node.name or result.name}/bias")
    node.outputs[0] = gs.Variable(model.fresh_name(f"{result.name}_unbiased"), result.dtype, result.shape)
    op.Add(node.outputs[0], op.constant(bias))
    op.nodes[-1].outputs[0] = result
    graph = model.graph
    at = next(i for i, other in enumerate(graph.nodes) if other is node)
    graph.nodes[at + 1 : at + 1] = op.nodes
