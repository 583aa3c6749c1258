"""Equations of operators that move elements around."""

from __future__ import annotations

from typing import Any

import onnx_graphsurgeon as gs

from onnxslim_llm.passes.cleanup.facts import constant_ints, shape_of
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.facts import rank_of
from onnxslim_llm.rewrite.matcher import Match
from onnxslim_llm.rewrite.pattern import PatternBuilder, Wildcard
from onnxslim_llm.rewrite.rule import Refusal, Rule, algebra
from onnxslim_llm.rewrite.schema import normal_domain

__all__ = ["LAYOUT"]

#: Slice ends from here on mean "to the end"; exporters write INT32_MAX or INT64_MAX.
_TO_THE_END = 2**31 - 1


# --- Transpose --------------------------------------------------------------------------------------------------------


def _order(perm: Any, rank: int | None) -> list[int] | None:
    if perm is not None:
        return [int(p) for p in perm]
    return None if rank is None else list(reversed(range(rank)))


def _keeps_order(match: Match) -> Refusal | None:
    order = _order(match.attributes["perm"], rank_of(match["x"]))
    if order is not None and order == sorted(order):
        return None
    return Refusal("it changes the order of the axes", match.root.name)


def _both_orders(match: Match) -> tuple[list[int], list[int]] | None:
    first, second = match.attributes["first"], match.attributes["second"]
    rank = rank_of(match["x"])
    rank = next((len(p) for p in (first, second) if p is not None), rank)
    left, right = _order(first, rank), _order(second, rank)
    return None if left is None or right is None else (left, right)


def _orders_known(match: Match) -> Refusal | None:
    if _both_orders(match) is None and not match.attributes["first"] is match.attributes["second"] is None:
        return Refusal("the rank is not known", match["x"].name)
    return None


def _transpose_once(op: Builder, x: gs.Tensor, match: Match) -> Any:
    orders = _both_orders(match)
    if orders is None:  # the axes are reversed twice
        return x
    first, second = orders
    order = [first[axis] for axis in second]
    return x if order == sorted(order) else op.Transpose(x, perm=order)


# --- Reshape, Squeeze, Unsqueeze --------------------------------------------------------------------------------------


def _reshapes_anyway(match: Match) -> Refusal | None:
    target = constant_ints(match["target"])
    if target is None:
        return Refusal("the shape is not a constant", match["target"].name)
    if int(match.attributes["allowzero"] or 0):
        return None
    before, between = shape_of(match["x"]), shape_of(match.root.inputs[0])
    for axis, size in enumerate(target):
        if size != 0:
            continue
        known = before is not None and between is not None and axis < len(before)
        if not known or before is None or between is None or before[axis] is None or before[axis] != between[axis]:
            return Refusal("a size is copied from the shape in between", match["target"].name)
    return None


def _reshape_once(op: Builder, x: gs.Tensor, target: gs.Tensor, match: Match) -> Any:
    return op.Reshape(x, target, **match.root.attrs)


def _same_axes(match: Match) -> Refusal | None:
    first, second = match.attributes["first"], match.attributes["second"]
    between = rank_of(match.root.inputs[0])
    rank = rank_of(match["x"]) if match.root.op == "Unsqueeze" else between
    left, right = sorted(map(int, first)), sorted(map(int, second))
    if left == right:
        return None
    if (
        rank is not None
        and sorted(a % rank for a in left) == sorted(a % rank for a in right)
        and len(left) == len(right)
    ):
        return None
    return Refusal("the axes differ", match.root.name)


def _given(value: Any) -> bool:
    return value is not None


# --- Slice, Split, Expand, Tile, Pad ----------------------------------------------------------------------------------


def _takes_all(match: Match) -> Refusal | None:
    node = match.root
    steps: list[int] | None
    if "starts" in node.attrs:
        starts, ends, steps = node.attrs["starts"], node.attrs["ends"], [1]
    else:
        starts, ends = constant_ints(node.inputs[1]), constant_ints(node.inputs[2])
        stepped = len(node.inputs) > 4 and not node.inputs[4].is_empty()
        steps = constant_ints(node.inputs[4]) if stepped else [1]
    if starts is None or ends is None or steps is None:
        return Refusal("its bounds are not constant", node.name)
    if any(s != 0 for s in starts) or any(e < _TO_THE_END for e in ends) or any(s != 1 for s in steps):
        return Refusal("it takes a part", node.name)
    return None


def _all_are(value: int, index: int = 1) -> Any:
    def check(match: Match) -> Refusal | None:
        sizes = constant_ints(match.root.inputs[index]) if len(match.root.inputs) > index else None
        rank = rank_of(match["x"])
        if sizes is None or any(size != value for size in sizes):
            return Refusal("it changes the shape", match.root.name)
        if match.root.op == "Expand" and (rank is None or len(sizes) > rank):
            return Refusal("it adds axes", match.root.name)
        return None

    return check


def _has_one_output(match: Match) -> Refusal | None:
    return None if len(match.root.outputs) == 1 else Refusal("it splits", match.root.name)


# --- Concat -----------------------------------------------------------------------------------------------------------


class FlattenConcat(Rule):
    """concat(concat(a, b), c) -> concat(a, b, c), where nothing else reads the inner one."""

    keep_shared = True
    name = "concat(concat(a, b), c) -> concat(a, b, c)"

    def pattern(self, op: PatternBuilder, *wildcards: Wildcard) -> Any:
        """Match every Concat: its inputs may be any number."""
        return op.Concat(op.var("x"), _open_ended=True)

    def check(self, match: Match) -> Refusal | None:
        """Find a Concat along the same axis among the inputs."""
        if any(_inner(match.root, tensor) for tensor in match.root.inputs):
            return None
        return Refusal("none of its inputs is another Concat of its own along that axis", match.root.name)

    def rewrite(self, op: Builder, match: Match) -> Any:
        """Take the inputs of the inner nodes."""
        flat: list[gs.Tensor] = []
        for tensor in match.root.inputs:
            inner = _inner(match.root, tensor)
            flat += list(inner.inputs) if inner is not None else [tensor]
        return op.Concat(*flat, **match.root.attrs)


def _inner(node: gs.Node, tensor: gs.Tensor) -> gs.Node | None:
    if not isinstance(tensor, gs.Variable) or len(tensor.inputs) != 1 or len(tensor.outputs) != 1:
        return None
    inner = tensor.inputs[0]
    rank = rank_of(tensor) or rank_of(node.outputs[0])
    if inner.op != "Concat" or normal_domain(inner.domain) != "" or inner.home is not node.home:
        return None
    if any(output is tensor for output in node.home.outputs):
        return None
    mine, theirs = int(node.attrs.get("axis", 1)), int(inner.attrs.get("axis", 1))
    if mine != theirs and (rank is None or mine % rank != theirs % rank):
        return None
    return inner


LAYOUT: tuple[Rule, ...] = (
    algebra("identity(x) -> x", lambda op, x: op.Identity(x), lambda op, x: x),
    algebra(
        "transpose(x, 0 1 2) -> x", lambda op, x: op.Transpose(x, perm=op.bind("perm")), lambda op, x: x, _keeps_order
    ),
    algebra(
        "transpose(transpose(x)) -> transpose(x)",
        lambda op, x: op.Transpose(op.Transpose(x, perm=op.bind("first")), perm=op.bind("second")),
        _transpose_once,
        _orders_known,
    ),
    algebra(
        "reshape(reshape(x)) -> reshape(x)",
        lambda op, x, target: op.Reshape(
            op.any_of("Reshape", "Flatten", "Squeeze", "Unsqueeze")(x, _open_ended=True),
            target,
            allowzero=op.bind("allowzero"),
        ),
        _reshape_once,
        _reshapes_anyway,
    ),
    algebra(
        "squeeze(unsqueeze(x)) -> x",
        lambda op, x: op.Squeeze(op.Unsqueeze(x, axes=op.bind("first", _given)), axes=op.bind("second", _given)),
        lambda op, x: x,
        _same_axes,
    ),
    algebra(
        "unsqueeze(squeeze(x)) -> x",
        lambda op, x: op.Unsqueeze(op.Squeeze(x, axes=op.bind("first", _given)), axes=op.bind("second", _given)),
        lambda op, x: x,
        _same_axes,
    ),
    algebra("slice(x, all) -> x", lambda op, x: op.Slice(x, _open_ended=True), lambda op, x: x, _takes_all),
    algebra("split(x, 1) -> x", lambda op, x: op.Split(x, _open_ended=True), lambda op, x: x, _has_one_output),
    algebra("expand(x, ones) -> x", lambda op, x: op.Expand(x, op.const("sizes")), lambda op, x: x, _all_are(1)),
    algebra("tile(x, ones) -> x", lambda op, x: op.Tile(x, op.const("sizes")), lambda op, x: x, _all_are(1)),
    algebra(
        "pad(x, zeros) -> x", lambda op, x: op.Pad(x, op.const("pads"), _open_ended=True), lambda op, x: x, _all_are(0)
    ),
    algebra("concat(x) -> x", lambda op, x: op.Concat(x), lambda op, x: x),
    FlattenConcat(),
)
