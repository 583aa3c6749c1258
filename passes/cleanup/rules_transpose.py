"""Equations of Transpose that reach across another operator, and of operators that Transpose hides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.normalization import RMS_NORM
from onnxslim_llm.passes.cleanup.facts import constant_ints, shape_of
from onnxslim_llm.rewrite.constants import constant_value
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.facts import rank_of
from onnxslim_llm.rewrite.matcher import Match
from onnxslim_llm.rewrite.pattern import PatternBuilder, Wildcard
from onnxslim_llm.rewrite.rule import Refusal, Rule, algebra
from onnxslim_llm.rewrite.schema import normal_domain

__all__ = ["TRANSPOSES"]

_TO_THE_END = 2**63 - 1
#: They compute each element from the one at the same place.
_ELEMENTWISE = frozenset(["Cast", "Neg"])
_ARITHMETIC = frozenset(["Add", "Div", "Mul", "Sub"])


class _Sandwich(NamedTuple):
    """transpose(f(transpose(x)))."""

    x: gs.Tensor
    first: list[int]
    middle: gs.Node
    second: list[int]


class MergeTransposes(Rule):
    """transpose(f(transpose(x))) -> transpose(f(x)), with one Transpose or none.

    f is a Cast, a Neg, arithmetic with one number, a Slice, one output of a Split (which becomes a Slice), or a norm of
    the last axis that the first Transpose leaves in place; nothing else reads its result. The first Transpose stays for
    its other readers.
    """

    keep_shared = True
    name = "transpose(f(transpose(x))) -> transpose(f(x))"

    def pattern(self, op: PatternBuilder, *wildcards: Wildcard) -> Any:
        """Match every Transpose."""
        return op.Transpose(op.var("y"))

    def check(self, match: Match) -> Refusal | None:
        """Look at what is in front of it."""
        if _sandwich(match) is None:
            return Refusal("nothing that commutes lies between it and another Transpose", match.root.name)
        return None

    def rewrite(self, op: Builder, match: Match) -> Any:
        """Let f read x, and transpose once."""
        found = _sandwich(match)
        assert found is not None
        x, first, middle, second = found
        old = match["y"]
        if middle.op == "Split":
            axis, start, end = _range_of(middle, old) or (0, 0, 0)
            new = op.Slice(x, [start], [end], [first[axis]])
        else:
            inputs = list(middle.inputs)
            inputs[_moved(middle)] = x
            if middle.op == "Slice":
                given = constant_ints(middle.inputs[3]) if len(middle.inputs) > 3 else None
                axes = range(len(constant_ints(middle.inputs[1]) or ())) if given is None else given
                inputs[3:4] = [np.array([first[axis] for axis in axes], np.int64)]
            new = op.call(middle.domain or "", middle.op, *inputs, **middle.attrs)
        new.dtype, new.inferred = old.dtype, True
        if old.shape is not None:
            new.shape = [old.shape[first.index(axis)] for axis in range(len(first))]
        order = [first[axis] for axis in second]
        return new if order == sorted(order) else op.Transpose(new, perm=order)


def _sandwich(match: Match) -> _Sandwich | None:
    between = match["y"]
    middle = _only_producer(between)
    if middle is None or len(between.outputs) != 1 or any(t is between for t in match.root.home.outputs):
        return None
    outer = _only_producer(middle.inputs[_moved(middle)]) if middle.inputs else None
    if outer is None or outer.op != "Transpose" or normal_domain(outer.domain) != "" or middle.home is not outer.home:
        return None
    rank = rank_of(outer.outputs[0])
    if rank is None or match.root.home is not middle.home:
        return None
    first, second = _perm(outer, rank), _perm(match.root, rank)
    if middle.op == "Split":
        fits = normal_domain(middle.domain) == "" and _range_of(middle, between) is not None
    else:
        fits = _commutes(middle, first, rank)
    if not fits:
        return None
    return _Sandwich(outer.inputs[0], first, middle, second)


def _moved(node: gs.Node) -> int:
    """Return the position of the input that is not a number."""
    if node.op in _ARITHMETIC and len(node.inputs) == 2 and constant_value(node.inputs[0]) is not None:
        return 1
    return 0


def _only_producer(tensor: gs.Tensor) -> gs.Node | None:
    return tensor.inputs[0] if isinstance(tensor, gs.Variable) and len(tensor.inputs) == 1 else None


def _commutes(node: gs.Node, first: list[int], rank: int) -> bool:
    if len(first) != rank or len(node.outputs) != 1:
        return False
    if RMS_NORM.is_call(node):
        return first[-1] == rank - 1
    if normal_domain(node.domain) != "":
        return False
    if node.op == "LayerNormalization":
        return first[-1] == rank - 1 and int(node.attrs.get("axis", -1)) in (-1, rank - 1)
    if node.op == "Slice":
        return len(node.inputs) > 2 and all(constant_ints(t) is not None for t in node.inputs[1:] if not t.is_empty())
    if node.op in _ARITHMETIC:
        number = constant_value(node.inputs[1 - _moved(node)])
        return number is not None and number.size == 1 and number.ndim <= rank
    return node.op in _ELEMENTWISE


def _range_of(split: gs.Node, output: gs.Tensor) -> tuple[int, int, int] | None:
    """Return (axis, start, end) of what an output of a Split is of its input, or None if that is not known."""
    rank, start = rank_of(output), 0
    if rank is None:
        return None
    axis = int(split.attrs.get("axis", 0)) % rank
    for tensor in split.outputs:
        shape = shape_of(tensor)
        size = shape[axis] if shape is not None and len(shape) == rank else None
        if not isinstance(size, int):
            return None
        if tensor is output:
            return axis, start, start + size
        start += size
    return None


def _takes_one_row(match: Match) -> Refusal | None:
    indices = constant_value(match["indices"])
    if indices is None or indices.shape != (1, 1) or int(match.attributes["batch"] or 0):
        return Refusal("it takes more than one row", match.root.name)
    return None if shape_of(match["x"]) is not None else Refusal("the rank is not known", match["x"].name)


def _row(op: Builder, x: gs.Tensor, match: Match) -> Any:
    indices = constant_ints(match["indices"])
    assert indices is not None
    start = indices[0]
    return op.Slice(x, [start], [_TO_THE_END if start == -1 else start + 1], [0])


def _is_outer_product(match: Match) -> Refusal | None:
    """Check that numbers h[..., H, 1] times x[..., 1, S] become [..., S, H]: inverse frequencies times positions."""
    column, rank = constant_value(match["column"]), rank_of(match.root.inputs[0])
    axes = match.attributes["axes"]
    if column is None or column.ndim < 2 or column.shape[-2:] != (column.size, 1):
        return Refusal("it is no product with a column", match["column"].name)
    if rank is None or column.ndim > rank or axes is None or rank_of(match["x"]) != rank - len(axes):
        return Refusal("the rank is not known", match["x"].name)
    if not _inserts_row(axes, rank):
        return Refusal("it is no product with a row", match["x"].name)
    order = _perm(match.root, rank)
    if order != [*range(rank - 2), rank - 1, rank - 2]:
        return Refusal("it transposes other axes than those of the matrix", match.root.name)
    return None


def _inserts_row(axes: Any, rank: int) -> bool:
    inserted = {int(axis) % rank for axis in axes}
    return rank - 2 in inserted and rank - 1 not in inserted


def _perm(node: gs.Node, rank: int) -> list[int]:
    return [int(axis) for axis in node.attrs.get("perm", reversed(range(rank)))]


def _times_row(op: Builder, x: gs.Tensor, match: Match) -> Any:
    column = constant_value(match["column"])
    rank = rank_of(match.root.inputs[0])
    assert column is not None
    assert rank is not None
    kept = {int(axis) % rank for axis in match.attributes["axes"]} - {rank - 2}
    spread = op.Unsqueeze(x, np.array(sorted({*kept, rank - 1}), np.int64))
    to = match.attributes.get("to")
    return op.Mul(spread if to is None else op.Cast(spread, to=to), column.reshape(-1))


_TRANSPOSED_OUTER = "transpose(matmul(column, unsqueeze(x))) -> unsqueeze(x) * row"


def _outer(name: str, row: Callable[[PatternBuilder, Wildcard], Any]) -> Rule:
    return algebra(
        name,
        lambda op, x: op.Transpose(op.MatMul(op.const("column"), row(op, x))),
        _times_row,
        _is_outer_product,
        keep_shared=False,
    )


TRANSPOSES: tuple[Rule, ...] = (
    MergeTransposes(),
    _outer(_TRANSPOSED_OUTER, lambda op, x: op.Unsqueeze(x, axes=op.bind("axes"))),
    _outer(
        f"{_TRANSPOSED_OUTER}, cast",
        lambda op, x: op.Cast(op.Unsqueeze(x, axes=op.bind("axes")), to=op.bind("to")),
    ),
    algebra(
        "gathernd(x, [[i]]) -> slice(x, i, i + 1)",
        lambda op, x: op.GatherND(x, op.const("indices"), batch_dims=op.bind("batch")),
        _row,
        _takes_one_row,
    ),
)
