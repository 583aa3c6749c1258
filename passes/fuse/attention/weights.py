"""From a Softmax on to the product of its weights and the values, and what is done with the result."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from onnxslim_llm.ir.shapes import SymbolicValues
from onnxslim_llm.passes.fuse.attention.axes import View, move
from onnxslim_llm.passes.fuse.attention.products import NotAttentionError, Product, read_product
from onnxslim_llm.passes.fuse.attention.rows import guard_against_empty_rows, guard_against_nan
from onnxslim_llm.passes.fuse.attention.scores import Scores
from onnxslim_llm.rewrite.constants import constant_value
from onnxslim_llm.rewrite.schema import normal_domain

__all__ = ["Weights", "read_weights", "users_of"]

_MOVING = frozenset(["Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"])


@dataclass
class Weights:
    """What happens to the weights.

    Attributes:
        product: Weights (left) times values (right).
        view: Axes of the weights there, in the atoms given.
        zero_rows: Weights of queries that see no key become 0 on the way.
        narrowed: The cast back to 16 bits, if there is one.
        nodes: All nodes on the way, the product last.
    """

    product: Product
    view: View
    zero_rows: bool = False
    narrowed: gs.Node | None = None
    nodes: list[gs.Node] = field(default_factory=list)


def users_of(tensor: gs.Tensor) -> list[gs.Node]:
    """Return the nodes that read `tensor`, each once."""
    return list({id(node): node for node in tensor.outputs}.values())


def read_weights(softmax: gs.Node, scores: Scores, values: SymbolicValues, graph_outputs: Collection[int]) -> Weights:
    """Follow the output of `softmax`, whose input is `scores`, to the product with the values.

    Raises:
        NotAttentionError: There is a step that an attention does not have, or something else reads the weights.
    """
    tensor, view = softmax.outputs[0], scores.view
    bias = scores.masks[0].operand if [mask.kind for mask in scores.masks] == ["add"] else None
    nodes: list[gs.Node] = []
    zero_rows = False
    narrowed: gs.Node | None = None
    while True:
        users = users_of(tensor)
        if id(tensor) in graph_outputs:
            raise NotAttentionError("the weights are an output of the graph", tensor)
        where = guard_against_nan(tensor, users)
        if where is not None:
            nodes += users
            zero_rows, tensor = True, where.outputs[0]
            continue
        if len(users) != 1:
            raise NotAttentionError(f"{len(users)} nodes read the weights", tensor)
        node = users[0]
        guard = guard_against_empty_rows(node, tensor, softmax.inputs[0], bias)
        if guard is not None:
            nodes += guard
            zero_rows, tensor = True, node.outputs[0]
            continue
        nodes.append(node)
        if normal_domain(node.domain) == "" and node.op in ("MatMul", "Einsum"):
            product = read_product(node, values)
            if product.left is product.right:
                raise NotAttentionError("the weights are multiplied with themselves", node)
            oriented = product if product.left is tensor else product.exchanged()
            return Weights(oriented, view, zero_rows, narrowed, nodes)
        if node.op == "Cast" and narrowed is None and node.inputs[0].dtype != node.outputs[0].dtype:
            narrowed = node
        elif node.op == "Dropout":
            _check_dropout(node)
        elif node.op in _MOVING:
            moved = move(node, view, values)
            if moved is None:
                raise NotAttentionError("the axes of the weights cannot be followed", node)
            view = moved
        else:
            raise NotAttentionError(f"{node.op} changes the weights after the Softmax", node)
        tensor = node.outputs[0]


def _check_dropout(node: gs.Node) -> None:
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        training = constant_value(node.inputs[2], limit=1)
        if training is None or training.any():
            raise NotAttentionError("the dropout is not known to be off", node)
    if len(node.outputs) > 1 and node.outputs[1].outputs:
        raise NotAttentionError("the mask of the dropout is used", node)
