"""Layer norms become one node each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.passes.fuse.norm_rules import (
    check_float32,
    check_narrow,
    check_vector,
    epsilon_of,
    inverse_root,
    keep_skips_at_means,
    ones_like,
    root_mean_square,
    vector,
)
from onnxslim_llm.passes.fuse.search import ready
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.engine import apply_rules
from onnxslim_llm.rewrite.matcher import Match
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.pattern import PatternBuilder, Wildcard
from onnxslim_llm.rewrite.rule import Refusal, Rule

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["FuseLayerNorm"]

_OP = "LayerNormalization"


class _Unit(Rule):
    """(x - mean(x)) / sqrt(mean((x - mean(x))^2) + epsilon), the norm without weight and bias.

    The mean is subtracted once or, by older exporters, twice.
    """

    explain = True

    def __init__(self, spelling: Callable[[PatternBuilder, Any, Any], Any]) -> None:
        self._spelling = spelling

    @property
    def name(self) -> str:
        return "layer norm"

    def pattern(self, op: PatternBuilder, x: Wildcard) -> Any:
        return self._spelling(op, _centred(op, x), _centred(op, x))

    def check(self, match: Match) -> Refusal | None:
        return check_float32(match, match["x"])

    def rewrite(self, op: Builder, match: Match) -> gs.Tensor:
        return _norm(op, match["x"], ones_like(op, match["x"]), epsilon=epsilon_of(match))


class _Narrow(Rule):
    """A float32 norm between casts from and to a 16-bit type: the operator casts like that."""

    explain = True
    near = 3

    @property
    def name(self) -> str:
        return "casts around a layer norm"

    def pattern(self, op: PatternBuilder, x: Wildcard) -> Any:
        wide = op.Cast(x, to=TensorProto.FLOAT)
        return op.Cast(_pattern(op, wide, op.var("weight")), to=op.bind("to"))

    def check(self, match: Match) -> Refusal | None:
        return check_narrow(match)

    def rewrite(self, op: Builder, match: Match) -> gs.Tensor:
        return _norm(op, match["x"], ones_like(op, match["x"]), **match.attributes)


class _Weight(Rule):
    """The product of a norm without weight and a vector."""

    explain = True
    near = 3

    @property
    def name(self) -> str:
        return "weight of a layer norm"

    def pattern(self, op: PatternBuilder, x: Wildcard) -> Any:
        return op.Mul(_pattern(op, x, 1.0), op.const("weight"))

    def check(self, match: Match) -> Refusal | None:
        return check_vector(match, "weight", "weight")

    def rewrite(self, op: Builder, match: Match) -> gs.Tensor:
        return _norm(op, match["x"], vector(op, match["weight"]), **match.attributes)


class _Bias(Rule):
    """The sum of a norm without bias and a vector."""

    explain = True
    near = 3

    @property
    def name(self) -> str:
        return "bias of a layer norm"

    def pattern(self, op: PatternBuilder, x: Wildcard, weight: Wildcard) -> Any:
        return op.Add(_pattern(op, x, weight), op.const("bias"))

    def check(self, match: Match) -> Refusal | None:
        return check_vector(match, "bias", "bias")

    def rewrite(self, op: Builder, match: Match) -> gs.Tensor:
        return _norm(op, match["x"], match["weight"], vector(op, match["bias"]), **match.attributes)


def _centred(op: PatternBuilder, x: Any) -> Any:
    return op.Sub(x, op.ReduceMean(x, axes=[-1], keepdims=1))


def _pattern(op: PatternBuilder, *inputs: Any) -> Any:
    return op.LayerNormalization(*inputs, axis=-1, stash_type=1, epsilon=op.bind("epsilon"))


def _norm(op: Builder, *inputs: gs.Tensor, epsilon: float, **_: Any) -> gs.Tensor:
    made: gs.Tensor = op.LayerNormalization(*inputs, axis=-1, epsilon=float(epsilon))
    return made


RULES: tuple[Rule, ...] = (
    _Unit(lambda op, d, e: op.Mul(d, inverse_root(op, e))),
    _Unit(lambda op, d, e: op.Div(d, root_mean_square(op, e))),
    _Narrow(),
    _Weight(),
    _Bias(),
)


@dataclass(frozen=True)
class FuseLayerNorm(Pass):
    """Turn layer norms over the last axis, however they are spelled, into one ai.onnx LayerNormalization each.

    A norm without a weight gets a weight of ones. A weight or bias that is applied in float32, before the result is
    cast to 16 bits, makes a float32 norm between the casts.

    Before:
        u = ReduceMean <axes = [-1]> (x)
        d = Sub (x, u)
        s = Pow (d, two)
        v = ReduceMean <axes = [-1]> (s)
        a = Add (v, epsilon)
        r = Sqrt (a)
        n = Div (d, r)
        w = Mul (n, weight)
        y = Add (w, bias)
    After:
        y = LayerNormalization <axis = -1, epsilon> (x, weight, bias)
    Skips when:
        - the model is older than opset 18 and cannot be converted;
        - epsilon is missing, not positive, or no single constant;
        - a mean is over other axes than the last one, or of something else than the squared difference;
        - the variance is computed as mean(x^2) - mean(x)^2, which rounds otherwise;
        - the mean is taken in another type than float32, or the type or the width is unknown;
        - an inner tensor is used elsewhere, or is an output of the graph;
        - a weight or bias is no vector of the width, or of another type: it stays a node of its own.
    """

    name: ClassVar[str] = "fuse_layer_norm"
    group: ClassVar[str] = "fuse"

    def apply(self, model: Model, context: Context) -> Change:
        """Fuse all norms; an older model is converted to opset 18 if there is one."""
        change = Change()
        if not ready(model, RULES, change):
            return change
        before = _norms(model)
        old = {id(node) for node in before}
        change.extend(apply_rules(model, RULES))
        norms = _norms(model)
        change.sites = [node.outputs[0].name for node in norms if id(node) not in old] or change.sites
        keep_skips_at_means(model, change, [node.outputs[0].name for node in norms])
        return change


def _norms(model: Model) -> list[gs.Node]:
    return [node for graph in model.graphs() for node in graph.nodes if node.op == _OP]
