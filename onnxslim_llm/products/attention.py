"""Where a product stands with regard to attention, told from the flow of data; names are never read.

Three kinds of products lose most by few bits (measured by benchmarks/quality/weight_only.py):

- value: what makes the values of an attention. Its output is a weighted mean of values, so that their errors reach the
  residual stream as they are, while errors of queries and keys only shift the weights.
- output: what brings the result of an attention back to the residual stream.
- first_block: all products up to the second attention; their errors go through the whole model.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.attention import is_attention
from onnxslim_llm.ir.topology import read_tensors

__all__ = ["SENSITIVE", "AttentionFlow", "Sensitive", "is_core"]

Sensitive = Literal["value", "output", "first_block"]
SENSITIVE: tuple[Sensitive, ...] = ("value", "output", "first_block")

#: They hand their input on in another shape, type or place; a bias and a cache do not change whose values these are.
_CARRIERS = frozenset(
    {
        *("Identity", "Cast", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Tile", "Concat"),
        *("Slice", "Split", "Add", "ScatterND", "ScatterElements", "TensorScatter"),
    }
)
_WATCHERS = frozenset({"Shape", "Size"})
#: Operators that have the values as their third input, as the attention concept does.
_FUSED = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention", "SparseAttention"})
#: Between the softmax and the product with the values: types, dropout, and what keeps masked rows from being NaN.
_AFTER_SOFTMAX = frozenset({"Identity", "Cast", "Dropout", "Where", "Mul", "Reshape", "Transpose"})
_STEPS = 8


class AttentionFlow:
    """The attentions of one graph, in topological order.

    Args:
        graph: Its nodes are sorted.
        products: `id`s of the nodes that multiply with a weight.
    """

    def __init__(self, graph: gs.Graph, products: Collection[int]) -> None:
        self._products = products
        self._cores = {id(node) for node in graph.nodes if is_core(node)}
        self._before: dict[int, int] = {}  # attentions on the longest way to a node
        self._ahead: dict[int, int] = {}  # node -> attentions before the one that it leads to without another product
        made: dict[int, int] = {}
        for node in graph.nodes:
            count = max((made.get(id(tensor), 0) for tensor in read_tensors(node)), default=0)
            self._before[id(node)] = count
            made.update((id(tensor), count + (id(node) in self._cores)) for tensor in node.outputs)
        for node in reversed(graph.nodes):
            after = {id(user) for tensor in node.outputs for user in tensor.outputs}
            near = [self._before[n] for n in after if n in self._cores]
            near += [self._ahead[n] for n in after if n in self._ahead and n not in products]
            if near:
                self._ahead[id(node)] = min(near)

    def kinds(self, product: gs.Node) -> set[Sensitive]:
        """Return in which ways a product is sensitive."""
        found: set[Sensitive] = set()
        if not self._cores:
            return found
        if _goes_to_values(product):
            found.add("value")
        if self._comes_from_core(product.inputs[0], _STEPS):
            found.add("output")
        if self._ahead.get(id(product), self._before[id(product)] - 1) <= 0:
            found.add("first_block")
        return found

    def _comes_from_core(self, tensor: gs.Tensor, steps: int) -> bool:
        if steps == 0 or not isinstance(tensor, gs.Variable) or not tensor.inputs:
            return False
        node = tensor.inputs[0]
        if id(node) in self._cores:
            return True
        return node.op in _CARRIERS and bool(node.inputs) and self._comes_from_core(node.inputs[0], steps - 1)


def is_core(node: gs.Node) -> bool:
    """Return whether a node weighs values: an attention operator, or the product behind a softmax."""
    return _is_fused(node) or (node.op == "MatMul" and _is_softmax(node.inputs[0], _STEPS))


def _is_fused(node: gs.Node) -> bool:
    return node.op in _FUSED or is_attention(node)


def _goes_to_values(product: gs.Node) -> bool:
    """Return whether all that is done with the product's result is to weigh it."""
    found = False
    seen: set[int] = set()
    stack = list(product.outputs)
    while stack:
        tensor = stack.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        for node in tensor.outputs:
            if is_core(node) and node.inputs[2 if _is_fused(node) else 1] is tensor:
                found = True
            elif node.op in _CARRIERS:
                stack.extend(node.outputs)
            elif node.op not in _WATCHERS:
                return False
    return found


def _is_softmax(tensor: gs.Tensor, steps: int) -> bool:
    if steps == 0 or not isinstance(tensor, gs.Variable) or not tensor.inputs:
        return False
    node = tensor.inputs[0]
    if node.op == "Softmax":
        return True
    return node.op in _AFTER_SOFTMAX and any(_is_softmax(before, steps - 1) for before in node.inputs)
