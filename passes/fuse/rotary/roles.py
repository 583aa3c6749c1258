"""What the axes of values run over: positions, columns of a table, or nothing.

Each rule says it for the result of an operator, or that the operator may mix elements along an axis of the positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.rewrite.rule import Refusal

__all__ = ["COLUMNS", "ROLES", "SAME", "NotRowwiseError", "Role", "Value", "merged_roles"]

#: An axis of the positions (0, 1), or one of the words below.
Role = int | str
#: All is the same along the axis.
SAME = "same"
COLUMNS = "columns"


class NotRowwiseError(Exception):
    """A value is no function of single positions; `refusal` says why."""

    def __init__(self, reason: str, culprit: str) -> None:
        super().__init__(reason)
        self.refusal = Refusal(reason, culprit)


class Value(NamedTuple):
    """An array, and what each of its axes runs over."""

    array: NDArray[np.generic]
    roles: tuple[Role, ...]


def merged_roles(node: gs.Node, values: Sequence[Value]) -> tuple[Role, ...]:
    """Return what the axes of a result run over whose operands are broadcast."""
    rank = max(len(value.roles) for value in values)
    merged: list[Role] = []
    for axis in range(-rank, 0):
        roles = {value.roles[axis] for value in values if -axis <= len(value.roles)} - {SAME}
        if len(roles) > 1:
            raise NotRowwiseError("positions and columns meet on one axis", node.name)
        merged.append(roles.pop() if roles else SAME)
    return tuple(merged)


def _matmul(node: gs.Node, values: Sequence[Value]) -> tuple[Role, ...]:
    a, b = values
    if min(a.array.ndim, b.array.ndim) < 2 or a.array.shape[-1] != 1:
        raise NotRowwiseError("MatMul sums", node.name)
    front = merged_roles(node, [Value(a.array, a.roles[:-2]), Value(b.array, b.roles[:-2])])
    return (*front, a.roles[-2], b.roles[-1])


def _transpose(node: gs.Node, values: Sequence[Value]) -> tuple[Role, ...]:
    roles = values[0].roles
    order = node.attrs.get("perm", range(len(roles))[::-1])
    return tuple(roles[int(axis)] for axis in order)


def _unsqueeze(node: gs.Node, values: Sequence[Value]) -> tuple[Role, ...]:
    axes = _axes(node, values)
    rank = len(values[0].roles) + len(axes)
    roles = iter(values[0].roles)
    new = {axis % rank for axis in axes}
    return tuple(SAME if axis in new else next(roles) for axis in range(rank))


def _squeeze(node: gs.Node, values: Sequence[Value]) -> tuple[Role, ...]:
    rank = len(values[0].roles)
    gone = {axis % rank for axis in _axes(node, values)}
    if not gone or any(values[0].roles[axis] != SAME for axis in gone):
        raise NotRowwiseError("it removes an axis of positions", node.name)
    return tuple(role for axis, role in enumerate(values[0].roles) if axis not in gone)


def _axes(node: gs.Node, values: Sequence[Value]) -> list[int]:
    given = node.attrs["axes"] if "axes" in node.attrs else values[1].array.reshape(-1) if len(values) > 1 else []
    return [int(axis) for axis in given]


def _along_columns(node: gs.Node, values: Sequence[Value]) -> tuple[Role, ...]:
    """Concat, Slice and Split of columns."""
    parts = values if node.op == "Concat" else values[:1]
    rank = len(parts[0].roles)
    if node.op == "Slice":
        count = values[1].array.size
        axes = {int(a) % rank for a in (values[3].array if len(values) > 3 else range(count))}
    else:
        axes = {int(node.attrs.get("axis", 0)) % rank}
    roles = list(merged_roles(node, parts))
    if any(roles[axis] not in (SAME, COLUMNS) for axis in axes):
        raise NotRowwiseError(f"{node.op} may mix positions", node.name)
    return tuple(COLUMNS if axis in axes else role for axis, role in enumerate(roles))


def _gather(node: gs.Node, values: Sequence[Value]) -> tuple[Role, ...]:
    data, indices = values
    axis = int(node.attrs.get("axis", 0)) % len(data.roles)
    if data.roles[axis] not in (SAME, COLUMNS):
        raise NotRowwiseError("Gather picks positions", node.name)
    return (*data.roles[:axis], *indices.roles, *data.roles[axis + 1 :])


def _gather_elements(node: gs.Node, values: Sequence[Value]) -> tuple[Role, ...]:
    data, indices = values
    axis = int(node.attrs.get("axis", 0)) % len(data.roles)
    rest = Value(data.array, tuple(SAME if i == axis else role for i, role in enumerate(data.roles)))
    if data.roles[axis] not in (SAME, COLUMNS):
        raise NotRowwiseError("GatherElements picks positions", node.name)
    if not any(isinstance(role, int) for role in indices.roles):
        raise NotRowwiseError("GatherElements picks columns", node.name)
    return merged_roles(node, [rest, indices])


ROLES: dict[str, Callable[[gs.Node, Sequence[Value]], tuple[Role, ...]]] = {
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
