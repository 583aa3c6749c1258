"""Tensors that are a function of positions alone, row by row.

The nodes behind a table of cosines are computed for the positions 0, 1, 2, ... while each axis of each value is told
what it runs over: an axis of the positions, the columns of the table, or nothing (all the same along it). Operators
that mix elements along an axis of the positions end the attempt. So what comes out is a proof, and the table itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.passes.fuse.rotary_steps import producer
from onnxslim_llm.passes.fuse.rotary_tables import ELEMENTWISE
from onnxslim_llm.rewrite.constants import constant_tensor
from onnxslim_llm.rewrite.evaluate import evaluate
from onnxslim_llm.rewrite.rule import Refusal

__all__ = ["PositionTable", "find_positions", "tabulate"]

#: Elements of a value on the way: 131072 positions of 256 columns.
MAX_ELEMENTS = 1 << 25
#: Nodes of one table; exports have some ten.
MAX_NODES = 128
#: What an axis runs over, beside the axes 0, 1 of the positions.
_SAME, _COLUMNS = "same", "columns"
_Role = int | str


class _NotRowwiseError(Exception):
    def __init__(self, reason: str, culprit: str) -> None:
        super().__init__(reason)
        self.refusal = Refusal(reason, culprit)


class _Value(NamedTuple):
    array: NDArray[np.generic]
    roles: tuple[_Role, ...]


@dataclass(frozen=True)
class PositionTable:
    """Rows [N, R / 2] for the positions 0 to N - 1.

    Attributes:
        rows: The table.
        indexed: Constants that the positions are an index of already.
    """

    rows: NDArray[np.generic]
    indexed: tuple[gs.Constant, ...]


def find_positions(tensor: gs.Tensor) -> gs.Tensor | Refusal:
    """Return the one tensor of integers, of rank 1 or 2, that a table is computed from."""
    found: dict[int, gs.Tensor] = {}
    waiting, seen = [tensor], set()
    while waiting:
        current = waiting.pop()
        if id(current) in seen or current.is_empty() or constant_tensor(current) is not None:
            continue
        seen.add(id(current))
        node = producer(current)
        if _is_positions(current, node):
            found[id(current)] = current
            continue
        if node is None or len(seen) > MAX_NODES:
            return Refusal("it is not computed from positions alone", current.name)
        waiting += _contents(node)
    if len(found) != 1:
        return Refusal("it is not computed from one tensor of positions", tensor.name)
    return next(iter(found.values()))


def _contents(node: gs.Node) -> list[gs.Tensor]:
    """Return the inputs whose elements the result has, without those that only say a shape."""
    return list(node.inputs[:1] if node.op in ("Expand", "Tile", "Reshape") else node.inputs)


def _is_positions(tensor: gs.Tensor, node: gs.Node | None) -> bool:
    dtype = getattr(tensor, "dtype", None)
    if dtype is None or np.dtype(dtype).kind not in "iu" or tensor.shape is None or len(tensor.shape) not in (1, 2):
        return False
    if node is not None and node.op == "Tile":
        return False  # what is repeated are the positions
    return node is None or node.op not in ("Unsqueeze", "Squeeze", "Identity") or len(node.inputs[0].shape or ()) == 0


def tabulate(tensor: gs.Tensor, positions: gs.Tensor, count: int, opset: int) -> PositionTable | Refusal:
    """Compute a table [B or 1, S, R / 2] for every position.

    Args:
        tensor: The table as the model computes it for its tokens.
        positions: What `find_positions` returned.
        count: Number of positions; 0 if it is not known. A constant that is indexed by position knows better.
        opset: Of the model.

    Returns:
        The table, or why it is no function of single positions or its number of positions is not known.
    """
    try:
        work = _Work(positions, _rows_indexed(tensor, positions) or count, opset)
        if not work.count:
            return Refusal("the number of positions is not known", tensor.name)
        value = work.value(tensor)
        rank = len(positions.shape or ())
        batch: _Role = 0 if rank == 2 else _SAME
        if len(value.roles) != 3 or value.roles[0] not in (batch, _SAME) or value.roles[1] != rank - 1:
            return Refusal("its axes are not batch, tokens and columns", tensor.name)
        rows = value.array.reshape(work.count, value.array.shape[-1])
        return PositionTable(np.ascontiguousarray(rows), tuple(work.indexed))
    except _NotRowwiseError as found:
        return found.refusal


def _rows_indexed(tensor: gs.Tensor, positions: gs.Tensor) -> int:
    """Return the number of rows of the constants that positions index; 0 if there are none, or of several sizes."""
    sizes: set[int] = set()
    waiting, seen = [tensor], set()
    while waiting:
        node = producer(waiting.pop())
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if node.op in ("Gather", "GatherElements"):
            data = _data_of(node)
            if data is not None:
                sizes.add(weight_of(data).shape[int(node.attrs.get("axis", 0))])
        waiting += [t for t in _contents(node) if t is not positions]
    return sizes.pop() if len(sizes) == 1 else 0


def _data_of(node: gs.Node) -> gs.Constant | None:
    """Return the constant that a Gather looks up in, through Tile and Expand."""
    tensor = node.inputs[0]
    before = producer(tensor)
    while before is not None and before.op in ("Tile", "Expand"):
        tensor = before.inputs[0]
        before = producer(tensor)
    return constant_tensor(tensor)


class _Work:
    def __init__(self, positions: gs.Tensor, count: int, opset: int) -> None:
        self.positions = positions
        self.count = count
        self.indexed: list[gs.Constant] = []
        self._opset = opset
        self._known: dict[int, _Value] = {}

    def value(self, tensor: gs.Tensor) -> _Value:
        """Return a tensor for the positions 0, 1, ..., of one text."""
        if id(tensor) not in self._known:
            found = self._find(tensor)
            if found.array.size > MAX_ELEMENTS:
                raise _NotRowwiseError("it is too large", tensor.name)
            self._known[id(tensor)] = found
        return self._known[id(tensor)]

    def _find(self, tensor: gs.Tensor) -> _Value:
        if tensor is self.positions:
            array = np.arange(self.count, dtype=np.dtype(tensor.dtype))
            return _Value(array[None], (0, 1)) if len(tensor.shape or ()) == 2 else _Value(array, (0,))
        constant = constant_tensor(tensor)
        if constant is not None:
            array = weight_of(constant).load()
            return _Value(array, tuple(_SAME if size == 1 else _COLUMNS for size in array.shape))
        node = producer(tensor)
        rule = None if node is None else _ROLES.get(node.op)
        if node is None or (len(node.outputs) > 1 and node.op != "Split"):
            raise _NotRowwiseError("it is not computed from positions alone", tensor.name)
        if node.op in ("Expand", "Tile"):
            return self._repeated(node)
        values = [None if t.is_empty() else self.value(t) for t in node.inputs]
        present = [v for v in values if v is not None]
        if node.op in ELEMENTWISE:
            roles = _merged(node, present)
        elif rule is not None:
            roles = rule(self, node, present)
        else:
            raise _NotRowwiseError(f"{node.op} may mix positions", node.name)
        if node.op == "GatherElements":
            results = _along_axis(node, present)
        else:
            results = evaluate(node, [None if v is None else v.array for v in values], self._opset)
        if results is None:
            raise _NotRowwiseError(f"{node.op} cannot be computed here", node.name)
        index = next(i for i, output in enumerate(node.outputs) if output is tensor)
        return _Value(results[index], roles)

    def _repeated(self, node: gs.Node) -> _Value:
        """Expand and Tile along axes where all is the same: broadcasting does it."""
        source, shape = self.value(node.inputs[0]), node.outputs[0].shape
        before = node.inputs[0].shape
        if shape is None or before is None:
            raise _NotRowwiseError(f"the sizes of {node.op} are not known", node.name)
        missing = len(shape) - len(before)
        for role, size, after in zip(source.roles, before, shape[missing:], strict=True):
            if role != _SAME and (size != after or size is None):
                raise _NotRowwiseError(f"{node.op} repeats positions or columns", node.name)
        array = source.array.reshape((1,) * missing + source.array.shape)
        return _Value(array, (*(_SAME,) * missing, *source.roles))

    def remember(self, node: gs.Node, indices: _Value) -> None:
        """Note that positions index a constant.

        Raises:
            _NotRowwiseError: They do not index it as they are.
        """
        axes = [axis for axis, role in enumerate(indices.roles) if isinstance(role, int)]
        counted = np.arange(self.count).reshape([-1 if axis == axes[-1] else 1 for axis in range(indices.array.ndim)])
        if not np.array_equal(indices.array, np.broadcast_to(counted, indices.array.shape)):
            raise _NotRowwiseError("positions are changed before they index a table", node.name)
        data = _data_of(node)
        if data is not None and all(data is not known for known in self.indexed):
            self.indexed.append(data)


def _along_axis(node: gs.Node, values: Sequence[_Value]) -> list[NDArray[np.generic]] | None:
    """GatherElements; the reference implementation refuses indices of another shape than the data."""
    data, indices = (value.array for value in values)
    try:
        return [np.take_along_axis(data, indices.astype(np.int64), int(node.attrs.get("axis", 0)))]
    except (IndexError, ValueError):
        return None


# --- What the axes of a result run over -------------------------------------------------------------------------------


def _merged(node: gs.Node, values: Sequence[_Value]) -> tuple[_Role, ...]:
    rank = max(len(value.roles) for value in values)
    merged: list[_Role] = []
    for axis in range(-rank, 0):
        roles = {value.roles[axis] for value in values if -axis <= len(value.roles)} - {_SAME}
        if len(roles) > 1:
            raise _NotRowwiseError("positions and columns meet on one axis", node.name)
        merged.append(roles.pop() if roles else _SAME)
    return tuple(merged)


def _matmul(_: _Work, node: gs.Node, values: Sequence[_Value]) -> tuple[_Role, ...]:
    a, b = values
    if min(a.array.ndim, b.array.ndim) < 2 or a.array.shape[-1] != 1:
        raise _NotRowwiseError("MatMul sums", node.name)
    front = _merged(node, [_Value(a.array, a.roles[:-2]), _Value(b.array, b.roles[:-2])])
    return (*front, a.roles[-2], b.roles[-1])


def _transpose(_: _Work, node: gs.Node, values: Sequence[_Value]) -> tuple[_Role, ...]:
    roles = values[0].roles
    order = node.attrs.get("perm", range(len(roles))[::-1])
    return tuple(roles[int(axis)] for axis in order)


def _unsqueeze(_: _Work, node: gs.Node, values: Sequence[_Value]) -> tuple[_Role, ...]:
    axes = _axes(node, values)
    rank = len(values[0].roles) + len(axes)
    roles = iter(values[0].roles)
    new = {axis % rank for axis in axes}
    return tuple(_SAME if axis in new else next(roles) for axis in range(rank))


def _squeeze(_: _Work, node: gs.Node, values: Sequence[_Value]) -> tuple[_Role, ...]:
    rank = len(values[0].roles)
    gone = {axis % rank for axis in _axes(node, values)}
    if not gone or any(values[0].roles[axis] != _SAME for axis in gone):
        raise _NotRowwiseError("it removes an axis of positions", node.name)
    return tuple(role for axis, role in enumerate(values[0].roles) if axis not in gone)


def _axes(node: gs.Node, values: Sequence[_Value]) -> list[int]:
    given = node.attrs["axes"] if "axes" in node.attrs else values[1].array.reshape(-1) if len(values) > 1 else []
    return [int(axis) for axis in given]


def _along_columns(_: _Work, node: gs.Node, values: Sequence[_Value]) -> tuple[_Role, ...]:
    """Concat, Slice and Split of columns."""
    parts = values if node.op == "Concat" else values[:1]
    rank = len(parts[0].roles)
    if node.op == "Slice":
        count = values[1].array.size
        axes = {int(a) % rank for a in (values[3].array if len(values) > 3 else range(count))}
    else:
        axes = {int(node.attrs.get("axis", 0)) % rank}
    roles = list(_merged(node, parts))
    if any(roles[axis] not in (_SAME, _COLUMNS) for axis in axes):
        raise _NotRowwiseError(f"{node.op} may mix positions", node.name)
    return tuple(_COLUMNS if axis in axes else role for axis, role in enumerate(roles))


def _gather(work: _Work, node: gs.Node, values: Sequence[_Value]) -> tuple[_Role, ...]:
    data, indices = values
    axis = int(node.attrs.get("axis", 0)) % len(data.roles)
    if data.roles[axis] not in (_SAME, _COLUMNS):
        raise _NotRowwiseError("Gather picks positions", node.name)
    if any(isinstance(role, int) for role in indices.roles):
        work.remember(node, indices)
    return (*data.roles[:axis], *indices.roles, *data.roles[axis + 1 :])


def _gather_elements(work: _Work, node: gs.Node, values: Sequence[_Value]) -> tuple[_Role, ...]:
    data, indices = values
    axis = int(node.attrs.get("axis", 0)) % len(data.roles)
    rest = _Value(data.array, tuple(_SAME if i == axis else role for i, role in enumerate(data.roles)))
    if data.roles[axis] not in (_SAME, _COLUMNS):
        raise _NotRowwiseError("GatherElements picks positions", node.name)
    if not any(isinstance(role, int) for role in indices.roles):
        raise _NotRowwiseError("GatherElements picks columns", node.name)
    work.remember(node, indices)
    return _merged(node, [rest, indices])


_ROLES: dict[str, Callable[[_Work, gs.Node, Sequence[_Value]], tuple[_Role, ...]]] = {
    "Concat": _along_columns,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "MatMul": _matmul,
    "Slice": _along_columns,
    "Split": _along_columns,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
