"""Where the elements of a tensor come from: axes as lists of atoms, followed through nodes that only move data.

An atom is an index that runs over one part of the elements. Each axis of a tensor is an ordered list of atoms (row
major; an axis of size 1 has none): Reshape regroups them and splits one where it must, Transpose permutes the axes,
Expand and Tile bring in atoms that the tensor before does not have. So a tensor at the start of a chain of such nodes
and the one at its end are described by the same atoms, and what the chain does is seen by comparing the lists.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.ir.shapes import SymbolicValues
from onnxslim_llm.ir.shapes.dims import Dim, divide, product
from onnxslim_llm.rewrite.constants import constant_value
from onnxslim_llm.rewrite.schema import normal_domain

__all__ = [
    "Atom",
    "Trail",
    "View",
    "exact_quotient",
    "follow_back",
    "leaves",
    "move",
    "regroup",
    "scaling",
    "size_of",
    "view_of",
]


class Atom:
    """An index of the given size; once split, the row-major pair `parts` takes its place. Compared by identity."""

    __slots__ = ("parts", "size")

    def __init__(self, size: Dim) -> None:
        self.size = size
        self.parts: tuple[Atom, ...] = ()

    def split(self, first: Dim, second: Dim) -> tuple[Atom, Atom]:
        """Cut the index into two, `first` * `second` being its size."""
        pair = (Atom(first), Atom(second))
        self.parts = pair
        return pair


Axis = list[Atom]
#: A tensor's axes.
View = list[Axis]


def leaves(atoms: Iterable[Atom]) -> list[Atom]:
    """Return the atoms with those that have been split since replaced by their parts."""
    found: list[Atom] = []
    for atom in atoms:
        found += leaves(atom.parts) if atom.parts else [atom]
    return found


def view_of(shape: Sequence[Dim]) -> View:
    """Return a view of new atoms, one for each axis that is not of size 1."""
    return [[] if dim == 1 else [Atom(dim)] for dim in shape]


def exact_quotient(dividend: Dim, divisor: Dim) -> Dim | None:
    """Return the quotient if it is known to be exact, or None."""
    if divisor == 0 or dividend == 0:
        return None
    quotient = divide(dividend, divisor)
    return quotient if quotient is not None and quotient * divisor == dividend else None


def regroup(atoms: Iterable[Atom], shape: Sequence[Dim]) -> View | None:
    """Return the same elements in the same order with the given shape; atoms are split where necessary.

    None if the sizes do not tell how, so that nothing may be said.
    """
    queue = deque(leaves(atoms))
    view: View = []
    for dim in shape:
        axis: Axis = []
        rest: Dim = dim
        while rest != 1:
            if not queue:
                return None
            atom = queue.popleft()
            whole = exact_quotient(rest, atom.size)
            if whole is None:
                second = exact_quotient(atom.size, rest)
                if second is None:
                    return None
                atom, remainder = atom.split(rest, second)
                queue.appendleft(remainder)
                whole = 1
            axis.append(atom)
            rest = whole
        view.append(axis)
    return None if queue else view


def move(node: gs.Node, view: View, values: SymbolicValues) -> View | None:
    """Return the view of the node's first output for the view of its first input.

    None unless it is known that the node only moves, repeats or regroups elements of that input.
    """
    rule = _MOVES.get(node.op) if normal_domain(node.domain) == "" else None
    before, after = values.shape_of(node.inputs[0]) if node.inputs else None, values.shape_of(node.outputs[0])
    if rule is None or before is None or after is None or 0 in before or 0 in after:
        return None
    return rule(_Move(node, values, view, before, after))


@dataclass(frozen=True)
class _Move:
    node: gs.Node
    values: SymbolicValues
    view: View
    before: tuple[Dim, ...]
    after: tuple[Dim, ...]

    def axis(self, default: int) -> int | None:
        axis, rank = int(self.node.attrs.get("axis", default)), len(self.before)
        return axis % rank if -rank <= axis < rank else None


def _same(m: _Move) -> View | None:
    return m.view


def _cast(m: _Move) -> View | None:
    same = m.node.inputs[0].dtype is not None and m.node.inputs[0].dtype == m.node.outputs[0].dtype
    return m.view if same else None


def _regrouped(m: _Move) -> View | None:
    return regroup((atom for axis in m.view for atom in axis), m.after)


def _transposed(m: _Move) -> View | None:
    order = m.node.attrs.get("perm") or list(reversed(range(len(m.view))))
    return [m.view[int(axis)] for axis in order]


def _expanded(m: _Move) -> View | None:
    new = len(m.after) - len(m.before)
    if new < 0:
        return None
    view = view_of(m.after[:new])
    for size, axis, wanted in zip(m.before, m.view, m.after[new:], strict=True):
        if size == wanted:
            view.append(axis)
        elif size == 1:
            view.append([Atom(wanted)])
        else:
            return None
    return view


def _tiled(m: _Move) -> View | None:
    repeats = m.values.value_of(m.node.inputs[1]) if len(m.node.inputs) > 1 else None
    if repeats is None or repeats.size != len(m.view) or any(r is None or r == 0 for r in repeats):
        return None
    return [axis if r == 1 else [Atom(r), *axis] for r, axis in zip(repeats, m.view, strict=True)]


def _copied(m: _Move) -> View | None:
    """Concat of one tensor with itself."""
    axis, count = m.axis(0), len(m.node.inputs)
    if axis is None or any(tensor is not m.node.inputs[0] for tensor in m.node.inputs):
        return None
    return [[Atom(count), *atoms] if i == axis and count > 1 else atoms for i, atoms in enumerate(m.view)]


def _gathered(m: _Move) -> View | None:
    """Gather that takes every index some times: 0 0 1 1 2 2 or 0 1 2 0 1 2."""
    axis = m.axis(0)
    indices = constant_value(m.node.inputs[1])
    if axis is None or indices is None or indices.ndim != 1 or indices.size == 0:
        return None
    size = m.before[axis]
    if not isinstance(size, int) or indices.size % size:
        return None
    places, count = np.where(indices < 0, indices + size, indices), indices.size // size
    if np.array_equal(places, np.repeat(np.arange(size), count)):
        inner = True
    elif np.array_equal(places, np.tile(np.arange(size), count)):
        inner = False
    else:
        return None
    extra = [Atom(count)] if count > 1 else []
    return [([*a, *extra] if inner else [*extra, *a]) if i == axis else a for i, a in enumerate(m.view)]


_MOVES = {
    "Cast": _cast,
    "Concat": _copied,
    "Expand": _expanded,
    "Flatten": _regrouped,
    "Gather": _gathered,
    "Identity": _same,
    "Reshape": _regrouped,
    "Squeeze": _regrouped,
    "Tile": _tiled,
    "Transpose": _transposed,
    "Unsqueeze": _regrouped,
}


@dataclass
class Trail:
    """A chain of nodes that move one tensor's elements, and scale them.

    Attributes:
        tensors: From the source to the end.
        views: Their axes, in common atoms. What a later view has and an earlier one lacks is repetition.
        factors: For each tensor, the factor between it and the end.
    """

    tensors: list[gs.Tensor]
    views: list[View]
    factors: list[float]


def follow_back(tensor: gs.Tensor, values: SymbolicValues, scalars: bool = False) -> Trail | None:
    """Return the longest chain that ends in `tensor`; None if its shape is unknown or has a size of 0.

    Args:
        tensor: The end of the chain.
        values: Shapes and small contents of the model.
        scalars: Follow products with and quotients by a number, too.
    """
    nodes: list[gs.Node] = []
    tensors, factors = [tensor], [1.0]
    while True:
        step = _step_back(tensors[-1], scalars)
        if step is None:
            break
        node, source, factor = step
        nodes.append(node)
        tensors.append(source)
        factors.append(factors[-1] * factor)
    for length in range(len(nodes), -1, -1):
        shape = values.shape_of(tensors[length])
        if shape is None or 0 in shape:
            continue
        views = [view_of(shape)]
        for node in reversed(nodes[:length]):
            view = views[-1] if node.op in _SCALINGS else move(node, views[-1], values)
            if view is None:
                break
            views.append(view)
        if len(views) == length + 1:
            return Trail(tensors[length::-1], views, factors[length::-1])
    return None


_SCALINGS = frozenset(["Mul", "Div"])


def _step_back(tensor: gs.Tensor, scalars: bool) -> tuple[gs.Node, gs.Tensor, float] | None:
    if not isinstance(tensor, gs.Variable) or len(tensor.inputs) != 1:
        return None
    node = tensor.inputs[0]
    if normal_domain(node.domain) != "" or not node.inputs or node.outputs[0] is not tensor:
        return None
    if node.op in _MOVES:
        return node, node.inputs[0], 1.0
    if scalars and node.op in _SCALINGS:
        return scaling(node)
    return None


def scaling(node: gs.Node) -> tuple[gs.Node, gs.Tensor, float] | None:
    """Return (node, scaled tensor, factor) of a product with, or quotient by, a number that adds no axes; or None."""
    for place in (1, 0) if node.op == "Mul" else (1,):
        value = constant_value(node.inputs[place], limit=1)
        other = node.inputs[1 - place]
        if value is None or value.dtype.kind != "f":
            continue
        if value.ndim and (other.shape is None or value.ndim > len(other.shape)):
            continue  # it would add axes
        factor = float(value.reshape(-1)[0])
        if node.op == "Div":
            factor = 1.0 / factor if factor else 0.0
        if np.isfinite(factor) and factor:
            return node, other, factor
    return None


def size_of(atoms: Iterable[Atom]) -> Dim:
    """Return the number of elements that the atoms run over."""
    return product(atom.size for atom in leaves(atoms))
