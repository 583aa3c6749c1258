"""The tables of a rotation: proving that they are tables of half the width, and making those.

Exporters compute a cosine for each element of a head, twice the same numbers. The second half is proved to equal the
first by following both to where they are computed from equal things; then the computation is rebuilt for one half.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.passes.fuse.rotary.elements import Elements
from onnxslim_llm.passes.fuse.rotary.match import Column, Rotation
from onnxslim_llm.passes.fuse.rotary.steps import Element, Picks, operand_picks, producer, sliced_axes
from onnxslim_llm.rewrite.constants import constant_tensor
from onnxslim_llm.rewrite.rule import Refusal

__all__ = ["ELEMENTWISE", "Table", "TableProofs", "table_of"]

#: Operators that compute each element from the elements at the same place of their inputs.
ELEMENTWISE = frozenset(
    {
        *("Abs", "Add", "Cast", "Ceil", "Clip", "Cos", "Div", "Exp", "Floor", "Identity", "Log", "Max", "Min", "Mod"),
        *("Mul", "Neg", "Pow", "Reciprocal", "Round", "Sin", "Sqrt", "Sub", "Where"),
    }
)
#: Operators that leave column i of the last axis there if its size stays.
_KEEPS_COLUMNS = frozenset(["Expand", "Reshape", "Squeeze", "Tile", "Transpose", "Unsqueeze"])
#: Steps of a computation that is compared; exports have some ten.
MAX_DEPTH = 48


@dataclass(frozen=True)
class Table:
    """Columns of one tensor.

    Attributes:
        tensor: What they are columns of.
        axis: The axis that they are numbered along.
        indices: Number of each column.
        constant: Other axes that are fixed.
        negative: The columns are to be negated.
    """

    tensor: gs.Tensor
    axis: int
    indices: tuple[int, ...]
    constant: Picks
    negative: bool


class TableProofs:
    """Compares columns of tables by what they are computed from.

    Args:
        elements: Of the model.
    """

    def __init__(self, elements: Elements) -> None:
        self._elements = elements
        self._known: dict[tuple[int, Picks], Hashable] = {}
        self._alive: list[gs.Tensor] = []
        self._proven: set[Hashable] = set()  # tables of other layers

    def refusal(self, rotation: Rotation) -> Refusal | None:
        """Return why the tables of a rotation cannot be halved, or are not cosines and sines of the same angles."""
        where = rotation.output.name
        columns = [*rotation.cosines, *rotation.sines, *(c for pair in rotation.partners for c in pair)]
        tables = tuple(column.origin.key for column in columns)
        if tables in self._proven:
            return None
        self._alive += [column.origin.tensor for column in columns]
        for (cosine, sine), cosine_again, sine_again in zip(
            rotation.partners, rotation.cosines, rotation.sines, strict=True
        ):
            if self._differ(cosine, cosine_again):
                return Refusal("the cosines of a pair are not known to be equal", cosine.operand.tensor.name)
            if self._differ(sine, sine_again):
                return Refusal("the sines of a pair are not known to be equal", sine.operand.tensor.name)
        for cosine, sine in zip(rotation.cosines, rotation.sines, strict=True):
            if not _same_angle(self.expression(cosine.origin), self.expression(sine.origin)):
                return Refusal("cosine and sine are not those of one angle, or not scaled alike", where)
        self._proven.add(tables)
        return None

    def _differ(self, a: Column, b: Column) -> bool:
        return a.origin.key != b.origin.key and self.expression(a.origin) != self.expression(b.origin)

    def expression(self, element: Element, depth: int = 0) -> Hashable:
        """Return how a column is computed; equal for columns that hold the same numbers by construction."""
        element = self._elements.origin(element)
        key = (id(element.tensor), element.picks)
        if key not in self._known:
            self._alive.append(element.tensor)
            self._known[key] = self._expression(element.tensor, element.picks, depth)
        found = self._known[key]
        return found if element.sign == 1 else ("Neg", (), found)

    def _expression(self, tensor: gs.Tensor, picks: Picks, depth: int) -> Hashable:
        unknown = ("tensor", id(tensor), picks)
        if constant_tensor(tensor) is not None:
            return self._constant(tensor, picks) or unknown
        node, shape = producer(tensor), self._elements.shape(tensor)
        if node is None or shape is None or depth > MAX_DEPTH:
            return unknown
        parts: list[Hashable] = []
        if node.op in ELEMENTWISE:
            for operand in node.inputs:
                known = None if operand.is_empty() else self._elements.shape(operand)
                if known is None:
                    return unknown
                parts.append(self.expression(Element(1, operand, operand_picks(picks, known, len(shape))), depth + 1))
            return (node.op, _attributes(node), tuple(parts))
        before = self._source(node, tensor, picks, len(shape))
        if before is None:
            return unknown
        # The same node does the same with equal columns, whatever it does with the free axes.
        rest = tuple(id(operand) for operand in node.inputs if operand is not before.tensor)
        self._alive += node.inputs
        return (node.op, _attributes(node), rest, self.expression(before, depth + 1))

    def _source(self, node: gs.Node, tensor: gs.Tensor, picks: Picks, rank: int) -> Element | None:
        """Return the column that one of `tensor` is computed from along the free axes."""
        source = node.inputs[1] if node.op == "MatMul" else node.inputs[0] if node.inputs else None
        shape = None if source is None else self._elements.shape(source)
        if source is None or shape is None or [axis for axis, _ in picks] != [rank - 1]:
            return None
        index, last = picks[0][1], len(shape) - 1
        if node.op == "MatMul":
            return Element(1, source, ((last, index),)) if len(shape) > 1 else None
        if node.op == "Gather":
            other_axis = int(node.attrs.get("axis", 0)) % len(shape) != last
            return Element(1, source, ((last, index),)) if other_axis else None
        size = self._elements.size(source, -1)
        if size is None or size != self._elements.size(tensor, -1):
            return None
        if node.op == "Slice":
            axes = sliced_axes(self._elements, node)
            return Element(1, source, ((last, index),)) if axes is not None and last not in axes else None
        if node.op == "Transpose" and list(node.attrs.get("perm", [0]))[-1] != last:
            return None
        return Element(1, source, ((last, index),)) if node.op in _KEEPS_COLUMNS else None

    def _constant(self, tensor: gs.Tensor, picks: Picks) -> Hashable | None:
        source = constant_tensor(tensor)
        assert source is not None
        weight = weight_of(source)
        if not isinstance(weight.dtype, np.dtype) or weight.dtype.kind not in "fiub":
            return None
        place: list[slice | int] = [slice(None)] * len(weight.shape)
        for axis, index in picks:
            place[axis] = index
        column = np.ascontiguousarray(weight.view()[tuple(place)])
        return ("constant", weight.onnx_dtype, column.shape, hashlib.sha256(column.tobytes()).hexdigest())


def table_of(columns: Sequence[Column]) -> Table | None:
    """Return the columns as a part of one tensor, or None if they come from several."""
    negated = {column.negated for column in columns}
    for by_operand in (False, True):
        elements = [column.operand if by_operand else column.origin for column in columns]
        if by_operand and len(negated) > 1:
            return None
        first = elements[0]
        axes = [axis for axis, _ in first.picks]
        if any(e.tensor is not first.tensor for e in elements):
            continue
        if not axes or any([axis for axis, _ in e.picks] != axes for e in elements):
            continue
        moving = [i for i in range(len(axes)) if len({e.picks[i][1] for e in elements}) > 1] or [len(axes) - 1]
        if len(moving) == 1:
            at = moving[0]
            constant = tuple(pick for i, pick in enumerate(first.picks) if i != at)
            indices = tuple(e.picks[at][1] for e in elements)
            if len(indices) > 1 and set(indices) == {0}:
                continue  # one column for all pairs
            return Table(first.tensor, axes[at], indices, constant, by_operand and True in negated)
    return None


def _attributes(node: gs.Node) -> Hashable:
    return tuple((name, str(value)) for name, value in sorted(node.attrs.items()))


def _same_angle(cosine: Hashable, sine: Hashable) -> bool:
    """Return False if both are known to be computed from angles, but not alike."""
    if not (_contains(cosine, "Cos") or _contains(cosine, "Sin")):
        return True
    if not (_contains(sine, "Cos") or _contains(sine, "Sin")):
        return True
    return _renamed(cosine, "Cos") == _renamed(sine, "Sin")


def _contains(expression: Hashable, op: str) -> bool:
    return isinstance(expression, tuple) and (expression[:1] == (op,) or any(_contains(e, op) for e in expression))


def _renamed(expression: Hashable, op: str) -> Hashable:
    if not isinstance(expression, tuple):
        return expression
    if expression[:1] == (op,):
        expression = ("angle", *expression[1:])
    return tuple(_renamed(part, op) for part in expression)
