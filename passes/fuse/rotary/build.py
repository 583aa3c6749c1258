"""Making the operands of a rotary embedding: tokens first, heads side by side, tables of half the width."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.rotary import rotary_concept
from onnxslim_llm.ir.shapes.dims import Dim
from onnxslim_llm.ir.shapes.symbolic import is_named
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.passes.fuse.rotary.elements import Elements
from onnxslim_llm.passes.fuse.rotary.match import Rotation
from onnxslim_llm.passes.fuse.rotary.steps import Element, producer, sliced_axes, unsqueezed_axes
from onnxslim_llm.passes.fuse.rotary.tables import ELEMENTWISE, Table
from onnxslim_llm.rewrite.constants import constant_tensor
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.rule import Refusal

__all__ = ["Layout", "RotaryBuilder", "layout_of"]


@dataclass(frozen=True)
class Layout:
    """What the axes in front of a head's elements mean.

    Attributes:
        tokens: The axis of tokens.
        heads: All other axes but that of the batch.
        sizes: Their sizes.
        batch: The first axis is the batch; otherwise there is none.
    """

    tokens: int
    heads: tuple[int, ...]
    sizes: tuple[int, ...]
    batch: bool = True


def layout_of(elements: Elements, rotation: Rotation, *tables: Table) -> Layout | Refusal:
    """Return the meaning of the axes, told by those along which the tables change."""
    shape, where = elements.shape(rotation.x), rotation.output.name
    assert shape is not None
    free = len(shape) - rotation.trailing
    changing = set()
    for table in tables:
        dims = _free_dims(elements, table)
        if len(dims) > free:
            return Refusal("the tables have more axes than what they rotate", table.tensor.name)
        changing |= {free - len(dims) + i for i, dim in enumerate(dims) if dim != 1}
    if free < 2:
        return Refusal("there is no axis of the batch", where)
    if free == 2 and changing == {0} and isinstance(shape[1], int):
        return Layout(0, (1,), (shape[1],), batch=False)  # tokens of all texts in one row
    candidates = changing - {0} if free > 2 else {1}
    if not candidates:  # one token
        candidates = {axis for axis in range(1, free) if shape[axis] == 1}
    if len(candidates) != 1:
        what = "differ from head to head" if candidates else "do not depend on the token"
        return Refusal(f"the tables {what}, as far as is known", tables[0].tensor.name)
    tokens = candidates.pop()
    if any(free - len(_free_dims(elements, table)) > tokens for table in tables):
        return Refusal("the tables have no axis of tokens", tables[0].tensor.name)
    heads = tuple(axis for axis in range(1, free) if axis != tokens)
    sizes = tuple(dim for axis in heads if isinstance(dim := shape[axis], int))
    if len(sizes) != len(heads):
        return Refusal("the number of heads is not known", rotation.x.name)
    return Layout(tokens, heads, sizes)


def _free_dims(elements: Elements, table: Table) -> list[Dim]:
    shape = elements.shape(table.tensor) or ()
    fixed = {table.axis, *(axis for axis, _ in table.constant)}
    return [dim for axis, dim in enumerate(shape) if axis not in fixed]


class RotaryBuilder:
    """Builds rotary embeddings; sites of one graph share the tables that are equal.

    Args:
        elements: Of the model before any change.
    """

    def __init__(self, elements: Elements) -> None:
        self._elements = elements
        self._tables: dict[Hashable, gs.Tensor] = {}
        self._rebuilt: dict[Hashable, gs.Tensor] = {}
        self._alive: list[gs.Tensor] = []

    def build(self, op: Builder, graph: gs.Graph, rotation: Rotation, layout: Layout, *tables: Table) -> gs.Tensor:
        """Return the rotated heads, laid out like `rotation.output`.

        Args:
            op: Takes the new nodes.
            graph: Where they will be.
            rotation: What to rotate.
            layout: The meaning of its axes.
            tables: Cosines and sines.
        """
        cosines, sines = (self._table(op, graph, rotation, layout, table) for table in tables)
        shape = self._elements.shape(rotation.x)
        assert shape is not None
        free = len(shape) - rotation.trailing
        x = rotation.x
        if self._width(shape[free:]) != rotation.width:
            start, end = rotation.offset, rotation.offset + rotation.width
            x = op.Slice(x, [start], [end], [-1])
        order = [*([0] if layout.batch else []), layout.tokens, *layout.heads]
        rows = [0, 0] if layout.batch else [1, -1]
        heads = math.prod(layout.sizes)
        tokens_first = [*order, *range(free, len(shape))]
        if tokens_first != sorted(tokens_first):
            x = op.Transpose(x, perm=tokens_first)
        if layout.heads or rotation.trailing > 1:
            x = op.Reshape(x, np.array([*rows, heads * rotation.width], np.int64))
        attributes = {"num_heads": heads, "rotary_dim": 2 * len(rotation.cosines)}
        y = rotary_concept(rotation.pairs).build(op, x, cosines, sines, **attributes)
        batch = shape[0] if layout.batch else 1
        self._annotate(y, rotation, (batch, shape[layout.tokens], heads * rotation.width))
        if layout.heads:
            front = [0, 0] if layout.batch else [-1]
            y = op.Reshape(y, np.array([*front, *layout.sizes, rotation.width], np.int64))
        back = [order.index(axis) for axis in range(free)]
        return op.Transpose(y, perm=[*back, free]) if back != sorted(back) else y

    @staticmethod
    def _width(dims: tuple[Dim, ...]) -> int:
        return math.prod(dim for dim in dims if isinstance(dim, int))

    @staticmethod
    def _annotate(y: gs.Variable, rotation: Rotation, dims: tuple[Dim, ...]) -> None:
        """Say the shape: inference does not see it through the concept's body."""
        y.dtype = rotation.output.dtype
        y.shape = [dim if isinstance(dim, int) else str(dim) if is_named(dim) else None for dim in dims]
        y.inferred = True

    def _table(self, op: Builder, graph: gs.Graph, rotation: Rotation, layout: Layout, table: Table) -> gs.Tensor:
        """Return a table as [B or 1, S, R / 2]."""
        free = len(self._elements.shape(rotation.x) or ()) - rotation.trailing
        absent = free - len(_free_dims(self._elements, table))
        heads = tuple(axis - absent for axis in layout.heads if axis >= absent)
        tokens = (self._elements.shape(rotation.x) or ())[layout.tokens]
        same = (id(graph), id(table.tensor), table.axis, table.indices, table.constant, table.negative)
        key = (*same, heads, absent, tokens, layout.batch)
        if key not in self._tables:
            self._alive.append(table.tensor)
            tensor = self._columns(op, graph, table, heads)
            tensor = op.Neg(tensor) if table.negative else tensor
            if absent > 0 or not layout.batch:  # the batch is missing, and maybe axes of heads
                tensor = op.Unsqueeze(tensor, [0])
            if _free_dims(self._elements, table)[layout.tokens - absent] != tokens:  # maybe one row
                count = op.Shape(rotation.x, start=layout.tokens, end=layout.tokens + 1)
                tensor = op.Expand(tensor, op.Concat(np.array([1], np.int64), count, np.array([1], np.int64), axis=0))
            self._tables[key] = tensor
        return self._tables[key]

    def _columns(self, op: Builder, graph: gs.Graph, table: Table, heads: tuple[int, ...]) -> gs.Tensor:
        """Return the columns of a table along the last axis, without those free axes that are numbered in `heads`."""
        shape = self._elements.shape(table.tensor)
        assert shape is not None
        rank, fixed = len(shape), [axis for axis, _ in table.constant]
        free = [axis for axis in range(rank) if axis != table.axis and axis not in fixed]
        behind = all(axis in fixed for axis in range(table.axis + 1, rank))
        take = None if len(table.indices) == shape[table.axis] and _is_range(table.indices) else table.indices
        if behind and all(shape[axis] == 1 for axis in fixed) and (take is None or table.axis == rank - 1):
            drop = frozenset(axis - rank for axis in (*fixed, *(free[head] for head in heads)))
            return self._rebuild(op, graph, table.tensor, take, drop)
        columns = self._columns_last(op, table, rank)
        if take is not None:
            columns = _part(op, columns, take)
        return op.Squeeze(columns, list(heads)) if heads else columns

    @staticmethod
    def _columns_last(op: Builder, table: Table, rank: int) -> gs.Tensor:
        tensor, axis = table.tensor, table.axis
        for fixed, index in reversed(table.constant):
            tensor = op.Gather(tensor, np.array(index, np.int64), axis=fixed)
            rank -= 1
            axis -= fixed < axis
        if axis == rank - 1:
            return tensor
        return op.Transpose(tensor, perm=[*(a for a in range(rank) if a != axis), axis])

    def _rebuild(
        self, op: Builder, graph: gs.Graph, tensor: gs.Tensor, take: tuple[int, ...] | None, drop: frozenset[int]
    ) -> gs.Tensor:
        """Return `tensor` with only the columns `take`, and without the axes `drop` (from the end, of size 1).

        What computes it is computed for these columns only.
        """
        shape = self._elements.shape(tensor)
        assert shape is not None
        drop = frozenset(axis for axis in drop if -axis <= len(shape))
        if not shape or shape[-1] == 1 or take == tuple(range(self._elements.size(tensor, -1) or 0)):
            take = None
        if take is None and not drop:
            return tensor
        key = (id(graph), id(tensor), take, drop)
        if key not in self._rebuilt:
            self._alive.append(tensor)
            whole = None if take is None else self._whole(tensor, take)
            if whole is not None:
                made = self._rebuild(op, graph, whole, None, drop)
            else:
                made = self._pushed(op, graph, tensor, take, drop)
            if made is None:
                made = tensor if take is None else _part(op, tensor, take)
                made = op.Squeeze(made, sorted(drop)) if drop else made
            self._rebuilt[key] = made
        return self._rebuilt[key]

    def _whole(self, tensor: gs.Tensor, take: tuple[int, ...]) -> gs.Tensor | None:
        """Return the farthest tensor that consists of just these columns, or None."""
        last = len(self._elements.shape(tensor) or ()) - 1
        ways = [self._elements.way(Element(1, tensor, ((last, index),))) for index in take]
        found = None
        for step in zip(*ways, strict=False):
            first = step[0].tensor
            picks = tuple(element.picks for element in step)
            same = all(element.tensor is first and element.sign == 1 for element in step)
            if same and self._elements.size(first, -1) == len(take):
                axis = len(self._elements.shape(first) or ()) - 1
                if picks == tuple(((axis, index),) for index in range(len(take))):
                    found = first
        return found

    def _pushed(
        self, op: Builder, graph: gs.Graph, tensor: gs.Tensor, take: tuple[int, ...] | None, drop: frozenset[int]
    ) -> gs.Tensor | None:
        """Let the inputs of what makes `tensor` be smaller; None if that cannot be."""
        if constant_tensor(tensor) is not None:
            return self._constant(op, tensor, take, drop)
        node, shape = producer(tensor), self._elements.shape(tensor)
        if node is None or shape is None:
            return None
        if node.op in ELEMENTWISE:
            if any(not t.is_empty() and self._elements.shape(t) is None for t in node.inputs):
                return None
            inputs = [None if t.is_empty() else self._rebuild(op, graph, t, take, drop) for t in node.inputs]
            return op.call("", node.op, *inputs, **node.attrs)
        if node.op == "Unsqueeze":
            return self._unsqueeze(op, graph, node, len(shape), take, drop)
        data = self._elements.shape(node.inputs[0]) if node.inputs else None
        if node.op == "Gather" and data is not None and len(data) == 2 and int(node.attrs.get("axis", 0)) == 0:
            rows = self._rebuild(op, graph, node.inputs[1], None, frozenset(axis + 1 for axis in drop))
            return op.Gather(self._rebuild(op, graph, node.inputs[0], take, frozenset()), rows, **node.attrs)
        if node.op == "Slice" and data is not None:
            axes = sliced_axes(self._elements, node)
            if axes is not None and len(data) - 1 not in axes and not drop & {axis - len(data) for axis in axes}:
                counted = [axis - len(data) for axis in axes]
                moved = [axis + sum(gone > axis for gone in drop) for axis in counted]
                source = self._rebuild(op, graph, node.inputs[0], take, drop)
                return op.Slice(source, *node.inputs[1:3], np.array(moved, np.int64), *node.inputs[4:])
        if node.op == "MatMul" and data is not None and not drop and len(data) > 1:
            columns = self._elements.shape(node.inputs[1])
            if columns is not None and len(columns) > 1:
                return op.MatMul(node.inputs[0], self._rebuild(op, graph, node.inputs[1], take, drop))
        return None

    def _unsqueeze(
        self,
        op: Builder,
        graph: gs.Graph,
        node: gs.Node,
        rank: int,
        take: tuple[int, ...] | None,
        drop: frozenset[int],
    ) -> gs.Tensor | None:
        axes = unsqueezed_axes(self._elements, node)
        if axes is None or (take is not None and rank - 1 in axes):
            return None
        new = {axis - rank for axis in axes}
        # The same axes counted in the input, and those that are left in the result.
        inner = frozenset(axis + sum(added > axis for added in new) for axis in drop - new)
        kept = sorted(axis + sum(gone > axis for gone in drop) for axis in new - drop)
        source = self._rebuild(op, graph, node.inputs[0], take, inner)
        return op.Unsqueeze(source, kept) if kept else source

    @staticmethod
    def _constant(op: Builder, tensor: gs.Tensor, take: tuple[int, ...] | None, drop: frozenset[int]) -> gs.Tensor:
        source = constant_tensor(tensor)
        assert source is not None
        value = weight_of(source).load()
        value = value if take is None else np.take(value, take, axis=-1)
        return op.constant(np.ascontiguousarray(np.squeeze(value, axis=tuple(drop)) if drop else value), source.name)


def _is_range(indices: tuple[int, ...]) -> bool:
    return indices == tuple(range(len(indices)))


def _part(op: Builder, tensor: gs.Tensor, take: tuple[int, ...]) -> gs.Tensor:
    """Return the columns `take` of the last axis."""
    steps = {b - a for a, b in pairwise(take)} or {1}
    if len(steps) == 1 and min(steps) > 0:
        return op.Slice(tensor, [take[0]], [take[-1] + 1], [-1], [steps.pop()])
    return op.Gather(tensor, np.array(take, np.int64), axis=-1)
