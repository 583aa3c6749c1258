"""Equations of arithmetic and logic."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from onnxslim_llm.passes.cleanup.facts import is_dropin
from onnxslim_llm.rewrite.constants import constant_value
from onnxslim_llm.rewrite.matcher import Match
from onnxslim_llm.rewrite.pattern import ConstantPattern
from onnxslim_llm.rewrite.rule import Refusal, Rule, algebra

__all__ = ["ARITHMETIC"]

_x_fits = partial(is_dropin, name="x")


def _all(value: bool) -> Callable[[Match], Refusal | None]:
    def check(match: Match) -> Refusal | None:
        condition = constant_value(match.root.inputs[0])
        if condition is None or condition.size == 0 or not np.all(condition == value):
            return Refusal("the condition is not the same everywhere", match.root.inputs[0].name)
        return is_dropin(match, "x" if value else "y")

    return check


def _is_inference(match: Match) -> Refusal | None:
    node = match.root
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        training = constant_value(node.inputs[2])
        if training is None or bool(np.any(training)):
            return Refusal("the Dropout is in training mode", node.inputs[2].name)
    if "is_test" in node.attrs and not node.attrs["is_test"]:
        return Refusal("the Dropout is in training mode", node.name)
    return None


def _no_limits(match: Match) -> Refusal | None:
    limited = "min" in match.root.attrs or "max" in match.root.attrs
    return Refusal("it clips", match.root.name) if limited else None


def _idempotent(function: str) -> Rule:
    name = function.lower()
    return algebra(
        f"{name}({name}(x)) -> {name}(x)",
        lambda op, x: op.any_of(function)(op.any_of(function)(x)),
        lambda op, match: match.root.inputs[0],
    )


# Exactly: 1.0000001 is not 1.
_ZERO, _ONE = ConstantPattern(np.asarray(0.0), 0.0), ConstantPattern(np.asarray(1.0), 0.0)

ARITHMETIC: tuple[Rule, ...] = (
    algebra("x + 0 -> x", lambda op, x: op.Add(x, _ZERO), lambda op, x: x, _x_fits),
    algebra("x - 0 -> x", lambda op, x: op.Sub(x, _ZERO), lambda op, x: x, _x_fits),
    algebra("x * 1 -> x", lambda op, x: op.Mul(x, _ONE), lambda op, x: x, _x_fits),
    algebra("x / 1 -> x", lambda op, x: op.Div(x, _ONE), lambda op, x: x, _x_fits),
    algebra("x ** 1 -> x", lambda op, x: op.Pow(x, _ONE), lambda op, x: x, _x_fits),
    algebra("x and true -> x", lambda op, x: op.And(x, True), lambda op, x: x, _x_fits),
    algebra("x or false -> x", lambda op, x: op.Or(x, False), lambda op, x: x, _x_fits),
    algebra("x xor false -> x", lambda op, x: op.Xor(x, False), lambda op, x: x, _x_fits),
    algebra("not not x -> x", lambda op, x: op.Not(op.Not(x)), lambda op, x: x),
    algebra("--x -> x", lambda op, x: op.Neg(op.Neg(x)), lambda op, x: x),
    *map(_idempotent, ("Abs", "Ceil", "Floor", "Relu", "Round", "Sign")),
    algebra("max(x) -> x", lambda op, x: op.any_of("Max", "Min", "Sum", "Mean")(x), lambda op, x: x),
    algebra("clip(x) -> x", lambda op, x: op.Clip(x), lambda op, x: x, _no_limits),
    algebra("where(true, x, y) -> x", lambda op, x, y: op.Where(op.const("c"), x, y), lambda op, x: x, _all(True)),
    algebra("where(false, x, y) -> y", lambda op, x, y: op.Where(op.const("c"), x, y), lambda op, y: y, _all(False)),
    algebra("where(c, x, x) -> x", lambda op, c, x: op.Where(c, x, x), lambda op, x: x, _x_fits),
    algebra(  # not if its mask is used
        "dropout(x) -> x",
        lambda op, x: op.Dropout(x, _open_ended=True),
        lambda op, x: x,
        _is_inference,
        keep_shared=False,
    ),
)
