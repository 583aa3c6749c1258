"""The result of an attention, followed forward to the tensor that is taken over."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxslim_llm.ir.shapes import SymbolicValues
from onnxslim_llm.ir.shapes.symbolic import is_named
from onnxslim_llm.passes.fuse.attention.arrange import Arrangement, arrange
from onnxslim_llm.passes.fuse.attention.axes import View, exact_quotient, leaves, move, regroup, size_of
from onnxslim_llm.passes.fuse.attention.operands import Axes
from onnxslim_llm.passes.fuse.attention.products import NotAttentionError, Product
from onnxslim_llm.passes.fuse.attention.weights import users_of

__all__ = ["Result", "Results", "read_results"]


@dataclass(frozen=True)
class Result:
    """A tensor that the fused attention takes the place of.

    Attributes:
        tensor: The tensor.
        arrangement: What makes it of the attention's output.
        cost: Nodes that move data before and after it.
    """

    tensor: gs.Variable
    arrangement: Arrangement
    cost: int


@dataclass(frozen=True)
class Results:
    """What follows the product of weights and values as long as elements only move.

    Attributes:
        tensors: The product's output and what comes after.
        views: Their axes.
        axes: What these stand for.
    """

    tensors: list[gs.Variable]
    views: list[View]
    axes: Axes

    def shape(self, heads_major: bool) -> list[int | str | None]:
        """Return what the attention puts out, as it is annotated."""
        dims = [size_of(axis) for axis in self.axes.layout(heads_major)]
        return [dim if isinstance(dim, int) else str(dim) if is_named(dim) else None for dim in dims]

    def best(self, heads_major: bool) -> Result | None:
        """Return the cheapest one for a layout."""
        found: Result | None = None
        layout = self.axes.layout(heads_major)
        for place, (tensor, view) in enumerate(zip(self.tensors, self.views, strict=True)):
            arrangement = arrange(layout, view)
            if arrangement is not None:
                cost = len(arrangement.steps) + len(self.tensors) - 1 - place
                if found is None or cost < found.cost:
                    found = Result(tensor, arrangement, cost)
        return found


def read_results(product: Product, heads: int, values: SymbolicValues, graph_outputs: Collection[int]) -> Results:
    """Follow the output of weights times values.

    Args:
        product: That product.
        heads: Number of query heads.
        values: Shapes.
        graph_outputs: `id`s of the tensors that have to stay.

    Raises:
        NotAttentionError: Its shape is not known.
    """
    ordered = product.out_view(values)
    if ordered is None:
        raise NotAttentionError("the shape of the result is not known", product.node)
    flat = [atom for axis in ordered[:-2] for atom in axis]
    if len(ordered) > 3:
        batch, by_head = list(ordered[0]), [atom for axis in ordered[1:-2] for atom in axis]
    else:
        rest = exact_quotient(size_of(flat), heads)
        parts = regroup(flat, (rest, heads)) if rest is not None else None
        if parts is None:
            raise NotAttentionError("batch and heads of the result cannot be told apart", product.node)
        batch, by_head = parts
    if size_of(by_head) != heads:
        raise NotAttentionError("the heads of the result cannot be told", product.node)
    axes = Axes(leaves(batch), leaves(by_head), ordered[-2], ordered[-1])
    tensors, views = [product.node.outputs[0]], [product.written(ordered)]
    while id(tensors[-1]) not in graph_outputs:
        users = users_of(tensors[-1])
        view = move(users[0], views[-1], values) if len(users) == 1 and users[0].inputs[0] is tensors[-1] else None
        if view is None or len(tensors[-1].outputs) != 1:
            break
        tensors.append(users[0].outputs[0])
        views.append(view)
    return Results(tensors, views, axes)
