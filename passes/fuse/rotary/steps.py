"""Steps back through operators that only move elements, or negate them.

An `Element` is a tensor with some of its axes fixed at an index: what is left, the free axes, is one column of numbers
(batch, heads and tokens, say). A step leads from an element of a node's output to the element of an input that it is;
it never changes what the free axes mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.ir.shapes import SymbolicValues
from onnxslim_llm.ir.shapes.dims import Dim
from onnxslim_llm.rewrite.constants import constant_value
from onnxslim_llm.rewrite.schema import normal_domain

__all__ = ["STEPS", "Element", "Picks", "Sizes", "Step", "operand_picks", "producer", "sliced_axes", "unsqueezed_axes"]

#: (axis, index) of the fixed axes, in the order of the axes.
Picks = tuple[tuple[int, int], ...]


class Element(NamedTuple):
    """`sign` times the column of `tensor` at `picks`."""

    sign: int
    tensor: gs.Tensor
    picks: Picks

    @property
    def key(self) -> tuple[int, int, Picks]:
        """What two elements that are the same have in common, while their tensors are alive."""
        return (self.sign, id(self.tensor), self.picks)


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """Return the node of the standard domain that makes `tensor`, or None."""
    if not isinstance(tensor, gs.Variable) or len(tensor.inputs) != 1:
        return None
    node: gs.Node = tensor.inputs[0]
    return node if normal_domain(node.domain) == "" else None


def operand_picks(picks: Picks, shape: tuple[Dim, ...], rank: int) -> Picks:
    """Return the picks in an operand of this shape of an elementwise operator whose result has `rank` axes."""
    shift = rank - len(shape)
    return tuple((a - shift, 0 if shape[a - shift] == 1 else i) for a, i in picks if a >= shift)


class Sizes:
    """What steps ask about tensors.

    Args:
        values: Shapes and small integer contents of the model, as it is now.
    """

    def __init__(self, values: SymbolicValues) -> None:
        self._values = values

    def shape(self, tensor: gs.Tensor) -> tuple[Dim, ...] | None:
        """Return the shape, or None if the rank is not known."""
        return self._values.shape_of(tensor)

    def size(self, tensor: gs.Tensor, axis: int) -> int | None:
        """Return the size of an axis if it is a number."""
        shape = self.shape(tensor)
        dim = shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
        return dim if isinstance(dim, int) else None

    def ints(self, tensor: gs.Tensor) -> list[int] | None:
        """Return the content of a small integer tensor if it is known."""
        value = self._values.known_value(tensor)
        return None if value is None else [int(v) for v in value.reshape(-1)]


#: (sizes, node, one of its outputs, picks of that) -> the element behind it, or None.
Step = Callable[[Sizes, gs.Node, gs.Tensor, Picks], Element | None]


def _identity(_: Sizes, node: gs.Node, __: gs.Tensor, picks: Picks) -> Element:
    return Element(1, node.inputs[0], picks)


def _neg(_: Sizes, node: gs.Node, __: gs.Tensor, picks: Picks) -> Element:
    return Element(-1, node.inputs[0], picks)


def _mul(sizes: Sizes, node: gs.Node, tensor: gs.Tensor, picks: Picks) -> Element | None:
    """A product with a constant that is 1 or -1 at these picks."""
    shape = sizes.shape(tensor)
    for moved, factor in (node.inputs, reversed(node.inputs)):
        value, before = constant_value(factor), sizes.shape(moved)
        if value is None or shape is None or before is None or len(before) != len(shape):
            continue
        sign = _sign(value, operand_picks(picks, value.shape, len(shape)))
        if sign is not None and all(before[axis] == shape[axis] for axis in _free(len(shape), picks)):
            return Element(sign, moved, operand_picks(picks, before, len(shape)))
    return None


def _sign(value: NDArray[np.generic], picks: Picks) -> int | None:
    fixed = dict(picks)
    if any(size != 1 for axis, size in enumerate(value.shape) if axis not in fixed):
        return None
    number = value[tuple(fixed.get(axis, 0) for axis in range(value.ndim))]
    return int(number) if number in (1, -1) else None


def _slice(sizes: Sizes, node: gs.Node, tensor: gs.Tensor, picks: Picks) -> Element | None:
    before, after = sizes.shape(node.inputs[0]), sizes.shape(tensor)
    bounds = _slice_bounds(sizes, node)
    if before is None or after is None or bounds is None:
        return None
    fixed = dict(picks)
    for axis, (start, _, step) in bounds.items():
        size = before[axis]
        if axis not in fixed:
            if before[axis] != after[axis] or step <= 0:
                return None
        elif not isinstance(size, int):
            if start < 0 or step <= 0:
                return None
            fixed[axis] = start + fixed[axis] * step
        else:
            first = start + size if start < 0 else start
            first = min(max(first, 0), size if step > 0 else size - 1)
            fixed[axis] = first + fixed[axis] * step
    return Element(1, node.inputs[0], _picks(fixed))


def _slice_bounds(sizes: Sizes, node: gs.Node) -> dict[int, tuple[int, int, int]] | None:
    """Return axis -> (start, end, step) of a Slice, or None if they are not known."""
    shape = sizes.shape(node.inputs[0])
    if shape is None:
        return None
    if "starts" in node.attrs:  # before opset 10
        starts, ends = list(node.attrs["starts"]), list(node.attrs["ends"])
        axes: list[int] | None = list(node.attrs.get("axes", range(len(starts))))
        steps: list[int] | None = [1] * len(starts)
    else:
        first, last = sizes.ints(node.inputs[1]), sizes.ints(node.inputs[2])
        if first is None or last is None:
            return None
        starts, ends = first, last
        axes = sizes.ints(node.inputs[3]) if _has(node, 3) else list(range(len(starts)))
        steps = sizes.ints(node.inputs[4]) if _has(node, 4) else [1] * len(starts)
    if axes is None or steps is None:
        return None
    rows = zip(axes, starts, ends, steps, strict=True)
    return {int(a) % len(shape): (int(s), int(e), int(k)) for a, s, e, k in rows}


def sliced_axes(sizes: Sizes, node: gs.Node) -> list[int] | None:
    """Return the axes along which a Slice takes a part, in the order of its bounds, or None."""
    shape = sizes.shape(node.inputs[0])
    if shape is None:
        return None
    if "starts" in node.attrs:  # before opset 10
        axes: list[int] | None = list(node.attrs.get("axes", range(len(node.attrs["starts"]))))
    elif _has(node, 3):
        axes = sizes.ints(node.inputs[3])
    else:
        count = sizes.size(node.inputs[1], 0)
        axes = None if count is None else list(range(count))
    return None if axes is None else [int(axis) % len(shape) for axis in axes]


def _split(sizes: Sizes, node: gs.Node, tensor: gs.Tensor, picks: Picks) -> Element | None:
    shape = sizes.shape(tensor)
    if shape is None:
        return None
    axis = int(node.attrs.get("axis", 0)) % len(shape)
    position = next(i for i, output in enumerate(node.outputs) if output is tensor)
    before = [sizes.size(output, axis) for output in node.outputs[:position]]
    known = [size for size in before if size is not None]
    fixed = dict(picks)
    if axis not in fixed or len(known) != position:
        return None
    fixed[axis] += sum(known)
    return Element(1, node.inputs[0], _picks(fixed))


def _concat(sizes: Sizes, node: gs.Node, tensor: gs.Tensor, picks: Picks) -> Element | None:
    shape = sizes.shape(tensor)
    if shape is None:
        return None
    axis, fixed = int(node.attrs.get("axis", 1)) % len(shape), dict(picks)
    if axis not in fixed:
        return None
    for part in node.inputs:
        size = sizes.size(part, axis)
        if size is None:
            return None
        if fixed[axis] < size:
            return Element(1, part, _picks(fixed))
        fixed[axis] -= size
    return None


def _gather(sizes: Sizes, node: gs.Node, tensor: gs.Tensor, picks: Picks) -> Element | None:
    before = sizes.shape(node.inputs[0])
    indices, shape = sizes.ints(node.inputs[1]), sizes.shape(node.inputs[1])
    if before is None or indices is None or shape is None or len(shape) > 1:
        return None
    axis = int(node.attrs.get("axis", 0)) % len(before)
    fixed = dict(picks)
    if len(shape) == 0:
        fixed = {a + (a >= axis): i for a, i in fixed.items()}
        fixed[axis] = indices[0]
    elif axis in fixed:
        fixed[axis] = indices[fixed[axis]]
    else:
        return None
    if fixed[axis] < 0:
        size = before[axis]
        if not isinstance(size, int):
            return None
        fixed[axis] += size
    return Element(1, node.inputs[0], _picks(fixed))


def _unsqueeze(sizes: Sizes, node: gs.Node, tensor: gs.Tensor, picks: Picks) -> Element | None:
    shape, fixed = sizes.shape(tensor), dict(picks)
    axes = unsqueezed_axes(sizes, node)
    if shape is None or axes is None or not axes <= fixed.keys():
        return None
    kept = {a - sum(new < a for new in axes): i for a, i in fixed.items() if a not in axes}
    return Element(1, node.inputs[0], _picks(kept))


def unsqueezed_axes(sizes: Sizes, node: gs.Node) -> set[int] | None:
    """Return the axes of the result that an Unsqueeze inserts, or None."""
    shape = sizes.shape(node.outputs[0])
    axes = node.attrs["axes"] if "axes" in node.attrs else sizes.ints(node.inputs[1]) if _has(node, 1) else None
    return None if axes is None or shape is None else {int(axis) % len(shape) for axis in axes}


def _reshape(sizes: Sizes, node: gs.Node, tensor: gs.Tensor, picks: Picks) -> Element | None:
    """Axes in front stay; those behind, all of them numbers and fixed, are cut in another way (Squeeze too)."""
    before, after = sizes.shape(node.inputs[0]), sizes.shape(tensor)
    if before is None or after is None:
        return None
    fixed, free = dict(picks), _free(len(after), picks)
    same = len(free)
    if free != list(range(same)) or before[:same] != after[:same]:
        return None
    tail, wanted = _numbers(before[same:]), _numbers(after[same:])
    if tail is None or wanted is None or math.prod(tail) != math.prod(wanted) or 0 in tail:
        return None
    flat = int(np.ravel_multi_index([fixed[same + i] for i in range(len(wanted))], wanted)) if wanted else 0
    indices = np.unravel_index(flat, tail) if tail else ()
    return Element(1, node.inputs[0], tuple((same + i, int(index)) for i, index in enumerate(indices)))


def _transpose(sizes: Sizes, node: gs.Node, tensor: gs.Tensor, picks: Picks) -> Element | None:
    shape = sizes.shape(tensor)
    if shape is None:
        return None
    order = [int(axis) for axis in node.attrs.get("perm", reversed(range(len(shape))))]
    free = [order[axis] for axis in _free(len(shape), picks)]
    if free != sorted(free):
        return None
    return Element(1, node.inputs[0], _picks({order[axis]: i for axis, i in picks}))


def _repeat(sizes: Sizes, node: gs.Node, tensor: gs.Tensor, picks: Picks) -> Element | None:
    """Expand and Tile along the fixed axes."""
    before, after = sizes.shape(node.inputs[0]), sizes.shape(tensor)
    if before is None or after is None:
        return None
    shift = len(after) - len(before)
    fixed = dict(picks)
    if any(axis < shift or before[axis - shift] != after[axis] for axis in _free(len(after), picks)):
        return None
    kept = {}
    for axis, index in fixed.items():
        size = before[axis - shift] if axis >= shift else 1
        if not isinstance(size, int) or size == 0:
            return None
        if axis >= shift:
            kept[axis - shift] = index % size
    return Element(1, node.inputs[0], _picks(kept))


STEPS: dict[str, Step] = {
    "Identity": _identity,
    "Neg": _neg,
    "Mul": _mul,
    "Slice": _slice,
    "Split": _split,
    "Concat": _concat,
    "Gather": _gather,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _reshape,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Expand": _repeat,
    "Tile": _repeat,
}


def _has(node: gs.Node, index: int) -> bool:
    return index < len(node.inputs) and not node.inputs[index].is_empty()


def _free(rank: int, picks: Picks) -> list[int]:
    fixed = dict(picks)
    return [axis for axis in range(rank) if axis not in fixed]


def _picks(fixed: dict[int, int]) -> Picks:
    return tuple(sorted(fixed.items()))


def _numbers(dims: tuple[Dim, ...]) -> list[int] | None:
    numbers = [dim for dim in dims if isinstance(dim, int)]
    return numbers if len(numbers) == len(dims) else None
