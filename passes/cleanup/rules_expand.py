"""Expand where broadcasting does the same."""

from __future__ import annotations

from typing import Any

import onnx_graphsurgeon as gs

from onnxslim_llm.passes.cleanup.facts import shape_of
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.matcher import Match
from onnxslim_llm.rewrite.pattern import PatternBuilder, Wildcard
from onnxslim_llm.rewrite.rule import Refusal, Rule
from onnxslim_llm.rewrite.schema import normal_domain

__all__ = ["EXPANDS"]

_Dims = tuple[int | str | None, ...]
#: Their operands broadcast. MatMul's do in all but the last two axes.
_BROADCASTING = (
    *("Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "MatMul", "Mul", "Or", "Sub"),
    *("Where", "Xor"),
)
_MATRIX_AXES = 2


class LetBroadcast(Rule):
    """f(expand(x), y) -> f(x, y), where y has the sizes that x is expanded to."""

    keep_shared = True
    name = "f(expand(x), y) -> f(x, y)"

    def pattern(self, op: PatternBuilder, *wildcards: Wildcard) -> Any:
        """Match every operator that broadcasts."""
        return op.any_of(*_BROADCASTING)(op.var("first"), _open_ended=True)

    def check(self, match: Match) -> Refusal | None:
        """Find an operand that need not be expanded."""
        if _superfluous(match.root) is None:
            return Refusal("no operand is expanded to what others have", match.root.name)
        return None

    def rewrite(self, op: Builder, match: Match) -> Any:
        """Read what is expanded."""
        inputs = list(match.root.inputs)
        position = _superfluous(match.root)
        assert position is not None
        inputs[position] = inputs[position].inputs[0].inputs[0]
        return op.call("", match.root.op, *inputs, **match.root.attrs)


def _superfluous(node: gs.Node) -> int | None:
    for position, tensor in enumerate(node.inputs):
        producer = tensor.inputs[0] if isinstance(tensor, gs.Variable) and len(tensor.inputs) == 1 else None
        if producer is None or producer.op != "Expand" or normal_domain(producer.domain) != "":
            continue
        small, large = shape_of(producer.inputs[0]), shape_of(tensor)
        others = [shape_of(other) for i, other in enumerate(node.inputs) if i != position]
        known = [shape for shape in others if shape is not None]
        if small is None or large is None or len(known) != len(others):
            continue
        if _needless(small, large, known, _MATRIX_AXES if node.op == "MatMul" else 0):
            return position
    return None


def _needless(small: _Dims, large: _Dims, others: list[_Dims], kept: int) -> bool:
    """Return whether the others broadcast `small` to `large`; the last `kept` axes must be the same already."""
    if kept and (len(small) < kept or any(len(shape) < kept for shape in others)):
        return False
    for axis in range(1, len(large) + 1):
        size = large[-axis]
        if axis <= len(small) and _same(small[-axis], size):
            continue
        if axis <= kept or not any(axis <= len(shape) and _same(shape[-axis], size) for shape in others):
            return False
    return True


def _same(a: int | str | None, b: int | str | None) -> bool:
    return a == b and a is not None and a != ""


EXPANDS: tuple[Rule, ...] = (LetBroadcast(),)
