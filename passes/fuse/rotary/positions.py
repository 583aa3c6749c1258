"""Tensors that are a function of positions alone, row by row.

The nodes behind a table of cosines are computed for the positions 0, 1, 2, ... while each axis of each value is told
what it runs over: an axis of the positions, the columns of the table, or nothing (all the same along it). Operators
that mix elements along an axis of the positions end the attempt. So what comes out is a proof, and the table itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.passes.fuse.rotary.roles import COLUMNS, ROLES, SAME, NotRowwiseError, Role, Value, merged_roles
from onnxslim_llm.passes.fuse.rotary.steps import producer
from onnxslim_llm.passes.fuse.rotary.tables import ELEMENTWISE
from onnxslim_llm.rewrite.constants import constant_tensor
from onnxslim_llm.rewrite.evaluate import evaluate
from onnxslim_llm.rewrite.rule import Refusal

__all__ = ["PositionTable", "find_positions", "tabulate"]

#: Elements of a value on the way: 131072 positions of 256 columns.
MAX_ELEMENTS = 1 << 25
#: Nodes of one table; exports have some ten.
MAX_NODES = 128
_LOOKUPS = ("Gather", "GatherElements")
_MOVES = frozenset(["Cast", "Expand", "Identity", "Reshape", "Squeeze", "Tile", "Unsqueeze"])


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
        value = work.value(tensor) if work.count else None
        if not work.indexed and work.count != count:  # something else than positions indexes that constant
            work = _Work(positions, count, opset)
            value = work.value(tensor) if count else None
        if value is None:
            return Refusal("the number of positions is not known", tensor.name)
        rank = len(positions.shape or ())
        batch: Role = 0 if rank == 2 else SAME
        if len(value.roles) != 3 or value.roles[0] not in (batch, SAME) or value.roles[1] != rank - 1:
            return Refusal("its axes are not batch, tokens and columns", tensor.name)
        rows = value.array.reshape(work.count, value.array.shape[-1])
        return PositionTable(np.ascontiguousarray(rows), tuple(work.indexed))
    except NotRowwiseError as found:
        return found.refusal
    except (ArithmeticError, IndexError, TypeError, ValueError):  # axes that do not fit: the node cannot run
        return Refusal("it cannot be computed", tensor.name)


def _rows_indexed(tensor: gs.Tensor, positions: gs.Tensor) -> int:
    """Return the number of rows of the constants that positions index; 0 if there are none, or of several sizes."""
    sizes: set[int] = set()
    waiting, seen = [tensor], set()
    while waiting:
        node = producer(waiting.pop())
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if node.op in _LOOKUPS:
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
        self._known: dict[int, Value] = {}

    def value(self, tensor: gs.Tensor) -> Value:
        """Return a tensor for the positions 0, 1, ..., of one text."""
        if id(tensor) not in self._known:
            found = self._find(tensor)
            if found.array.size > MAX_ELEMENTS:
                raise NotRowwiseError("it is too large", tensor.name)
            self._known[id(tensor)] = found
        return self._known[id(tensor)]

    def _find(self, tensor: gs.Tensor) -> Value:
        if tensor is self.positions:
            array = np.arange(self.count, dtype=np.dtype(tensor.dtype))
            return Value(array[None], (0, 1)) if len(tensor.shape or ()) == 2 else Value(array, (0,))
        constant = constant_tensor(tensor)
        if constant is not None:
            array = weight_of(constant).load()
            return Value(array, tuple(SAME if size == 1 else COLUMNS for size in array.shape))
        node = producer(tensor)
        rule = None if node is None else ROLES.get(node.op)
        if node is None or (len(node.outputs) > 1 and node.op != "Split"):
            raise NotRowwiseError("it is not computed from positions alone", tensor.name)
        if node.op in ("Expand", "Tile"):
            return self._repeated(node)
        values = [None if t.is_empty() else self.value(t) for t in node.inputs]
        present = [v for v in values if v is not None]
        if node.op in ELEMENTWISE:
            roles = merged_roles(node, present)
        elif rule is not None:
            roles = rule(node, present)
        else:
            raise NotRowwiseError(f"{node.op} may mix positions", node.name)
        if node.op in _LOOKUPS and any(isinstance(role, int) for role in present[1].roles):
            self._note_lookup(node)
        if node.op == "GatherElements":
            results = _along_axis(node, present)
        else:
            results = evaluate(node, [None if v is None else v.array for v in values], self._opset)
        if results is None:
            raise NotRowwiseError(f"{node.op} cannot be computed here", node.name)
        index = next(i for i, output in enumerate(node.outputs) if output is tensor)
        return Value(results[index], roles)

    def _repeated(self, node: gs.Node) -> Value:
        """Expand and Tile along axes where all is the same: broadcasting does it."""
        source, shape = self.value(node.inputs[0]), node.outputs[0].shape
        before = node.inputs[0].shape
        if shape is None or before is None:
            raise NotRowwiseError(f"the sizes of {node.op} are not known", node.name)
        missing = len(shape) - len(before)
        for role, size, after in zip(source.roles, before, shape[missing:], strict=True):
            if role != SAME and (size != after or size is None):
                raise NotRowwiseError(f"{node.op} repeats positions or columns", node.name)
        array = source.array.reshape((1,) * missing + source.array.shape)
        return Value(array, (*(SAME,) * missing, *source.roles))

    def _note_lookup(self, node: gs.Node) -> None:
        """Note that positions index a constant.

        Raises:
            NotRowwiseError: They do not index it as they are.
        """
        tensor = node.inputs[1]
        while tensor is not self.positions:
            before = producer(tensor)
            if before is None or before.op not in _MOVES:  # not even clipped: then none is out of bounds
                raise NotRowwiseError("positions are changed before they index a table", node.name)
            tensor = before.inputs[0]
        data = _data_of(node)
        if data is not None and all(data is not known for known in self.indexed):
            self.indexed.append(data)


def _along_axis(node: gs.Node, values: Sequence[Value]) -> list[NDArray[np.generic]] | None:
    """GatherElements; the reference implementation refuses indices of another shape than the data."""
    data, indices = (value.array for value in values)
    try:
        return [np.take_along_axis(data, indices.astype(np.int64), int(node.attrs.get("axis", 0)))]
    except (IndexError, ValueError):
        return None
