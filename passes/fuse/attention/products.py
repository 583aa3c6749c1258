"""Batched matrix products, whether they are spelled MatMul or Einsum."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxslim_llm.ir.shapes import SymbolicValues
from onnxslim_llm.ir.shapes.dims import Dim
from onnxslim_llm.passes.fuse.attention.axes import View, view_of
from onnxslim_llm.rewrite.rule import Refusal
from onnxslim_llm.rewrite.schema import normal_domain

__all__ = ["NotAttentionError", "Product", "read_product", "reason_of"]


class NotAttentionError(Exception):
    """What looked like an attention is none; `refusal` says why."""

    def __init__(self, reason: str, culprit: gs.Node | gs.Tensor) -> None:
        super().__init__(reason)
        name = culprit.name
        if isinstance(culprit, gs.Node) and not name:
            name = next((tensor.name for tensor in culprit.outputs), culprit.op)
        self.refusal = Refusal(reason, name)


def reason_of(error: NotAttentionError) -> str:
    """Return the reason as a sentence that names the culprit."""
    return f"{error.refusal.reason} at '{error.refusal.culprit}'"


@dataclass(frozen=True)
class Product:
    """out[batch..., row, column] = sum over inner of left[batch..., row, inner] * right[batch..., inner, column].

    Attributes:
        node: The node.
        left, right: Its operands.
        left_order, right_order: Which of their axes stand for (batch..., row, inner) and (batch..., inner, column).
        out_order: Which of (batch..., row, column) the axes of the output stand for.
    """

    node: gs.Node
    left: gs.Tensor
    right: gs.Tensor
    left_order: tuple[int, ...]
    right_order: tuple[int, ...]
    out_order: tuple[int, ...]

    def exchanged(self) -> Product:
        """Return the same product as right^T left^T, rows and columns being exchanged."""
        *batch, row, column = range(len(self.out_order))
        swapped = [*batch, column, row]
        return Product(
            self.node,
            self.right,
            self.left,
            (*self.right_order[:-2], self.right_order[-1], self.right_order[-2]),
            (*self.left_order[:-2], self.left_order[-1], self.left_order[-2]),
            tuple(swapped.index(place) for place in self.out_order),
        )

    def out_view(self, values: SymbolicValues) -> View | None:
        """Return new atoms for (batch..., row, column)."""
        shape = values.shape_of(self.node.outputs[0])
        if shape is None or len(shape) != len(self.out_order):
            return None
        ordered: list[Dim] = [1] * len(shape)
        for place, dim in zip(self.out_order, shape, strict=True):
            ordered[place] = dim
        return view_of(ordered)

    def written(self, view: View) -> View:
        """Return a view of (batch..., row, column) in the order of the output's axes."""
        return [view[place] for place in self.out_order]


def read_product(node: gs.Node, values: SymbolicValues) -> Product:
    """Return the batched product that a node computes.

    Raises:
        NotAttentionError: It computes none, or ranks are not known.
    """
    if normal_domain(node.domain) == "" and node.op == "MatMul":
        return _matmul(node, values)
    if normal_domain(node.domain) == "" and node.op == "Einsum" and len(node.inputs) == 2:
        return _einsum(node)
    raise NotAttentionError(f"{node.op} is no product of queries, keys or values", node)


def _matmul(node: gs.Node, values: SymbolicValues) -> Product:
    left, right = node.inputs
    ranks = [values.shape_of(left), values.shape_of(right)]
    if ranks[0] is None or ranks[1] is None:
        raise NotAttentionError("the rank of an operand is not known", node)
    a, b = len(ranks[0]), len(ranks[1])
    if min(a, b) < 2:
        raise NotAttentionError("an operand is a vector", node)
    return Product(node, left, right, tuple(range(a)), tuple(range(b)), tuple(range(max(a, b))))


def _einsum(node: gs.Node) -> Product:
    equation = str(node.attrs.get("equation", "")).replace(" ", "")
    operands, arrow, out = equation.partition("->")
    left, comma, right = operands.partition(",")
    letters = [left, right, out]
    if not arrow or not comma or "." in equation or any(len(set(x)) != len(x) for x in letters):
        raise NotAttentionError("its equation is no plain product", node)
    batch = [x for x in out if x in left and x in right]
    rows = [x for x in out if x in left and x not in right]
    columns = [x for x in out if x in right and x not in left]
    inner = [x for x in left if x in right and x not in out]
    if [len(rows), len(columns), len(inner)] != [1, 1, 1] or len({*left, *right}) != len(batch) + 3:
        raise NotAttentionError("its equation is no batched matrix product", node)
    row, column, middle = rows[0], columns[0], inner[0]
    full = [*batch, row, column]
    return Product(
        node,
        node.inputs[0],
        node.inputs[1],
        tuple(left.index(x) for x in [*batch, row, middle]),
        tuple(right.index(x) for x in [*batch, middle, column]),
        tuple(full.index(x) for x in out),
    )
