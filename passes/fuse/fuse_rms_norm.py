"""Root-mean-square norms become one node each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.concepts.concept import DOMAIN, calls
from onnxslim_llm.concepts.normalization import RMS_NORM
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
from onnxslim_llm.rewrite.facts import onnx_type, rank_of
from onnxslim_llm.rewrite.matcher import Match, Matcher
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.pattern import PatternBuilder, Wildcard
from onnxslim_llm.rewrite.rule import Refusal, Rule

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["FuseRmsNorm"]

_EPSILON = 1e-5  # default of SimplifiedLayerNormalization
_CENTRED = "the mean is subtracted first: this is a layer norm"
#: Nodes down to the root of the mean square.
_NEAR = 2


class _Unit(Rule):
    """x / sqrt(mean(x^2) + epsilon), the norm without its weight."""

    explain = True
    near = _NEAR

    def __init__(self, spelling: Callable[[PatternBuilder, Any], Any]) -> None:
        self._spelling = spelling

    @property
    def name(self) -> str:
        return "rms norm"

    def pattern(self, op: PatternBuilder, x: Wildcard) -> Any:
        return self._spelling(op, x)

    def check(self, match: Match) -> Refusal | None:
        refusal = check_float32(match, match["x"])
        if refusal is None and _is_centred(match["x"]):
            return Refusal(_CENTRED, match["x"].name)
        return refusal

    def rewrite(self, op: Builder, match: Match) -> gs.Tensor:
        x = match["x"]
        return RMS_NORM.build(op, x, ones_like(op, x), epsilon=epsilon_of(match))


class _Narrow(Rule):
    """A float32 norm between casts from and to a 16-bit type: the concept casts like that."""

    explain = True
    near = 3

    @property
    def name(self) -> str:
        return "casts around an rms norm"

    def pattern(self, op: PatternBuilder, x: Wildcard) -> Any:
        wide = op.Cast(x, to=TensorProto.FLOAT)
        norm = op.RMSNorm(wide, op.var("weight"), _domain=DOMAIN, epsilon=op.bind("epsilon"))
        return op.Cast(norm, to=op.bind("to"))

    def check(self, match: Match) -> Refusal | None:
        return check_narrow(match)

    def rewrite(self, op: Builder, match: Match) -> gs.Tensor:
        x = match["x"]
        return RMS_NORM.build(op, x, ones_like(op, x), epsilon=match.attributes["epsilon"])


class _Weight(Rule):
    """The product of a norm without weight and a vector."""

    explain = True
    near = 3

    @property
    def name(self) -> str:
        return "weight of an rms norm"

    def pattern(self, op: PatternBuilder, x: Wildcard) -> Any:
        norm = op.RMSNorm(x, 1.0, _domain=DOMAIN, epsilon=op.bind("epsilon"))
        return op.Mul(norm, op.const("weight"))

    def check(self, match: Match) -> Refusal | None:
        return check_vector(match, "weight", "weight")

    def rewrite(self, op: Builder, match: Match) -> gs.Tensor:
        weight = vector(op, match["weight"])
        return RMS_NORM.build(op, match["x"], weight, epsilon=match.attributes["epsilon"])


class _Operator(Rule):
    """An operator that is an RMS norm already."""

    explain = True
    near = 1

    def __init__(self, op: str, default_epsilon: float | None = None) -> None:
        self._op, self._default = op, default_epsilon

    @property
    def name(self) -> str:
        return self._op

    def pattern(self, op: PatternBuilder, x: Wildcard, weight: Wildcard) -> Any:
        attributes = {name: op.bind(name) for name in ("axis", "stash_type", "epsilon")}
        return op.any_of(self._op)(x, weight, **attributes)

    def check(self, match: Match) -> Refusal | None:
        x, found = match["x"], match.attributes
        rank = rank_of(x)
        last = {-1, None} | ({rank - 1} if rank else set())
        if found["axis"] not in last:
            return Refusal(f"it normalises from axis {found['axis']} on, not the last one only", x.name)
        if found["stash_type"] not in (None, TensorProto.FLOAT):
            return Refusal("it does not compute in float32", x.name)
        if onnx_type(x) is None:
            return Refusal("the type is unknown", x.name)
        return check_vector(match, "weight", "weight")

    def rewrite(self, op: Builder, match: Match) -> gs.Tensor:
        epsilon = match.attributes["epsilon"]
        epsilon = self._default if epsilon is None else epsilon
        return RMS_NORM.build(op, match["x"], vector(op, match["weight"]), epsilon=epsilon)


RULES: tuple[Rule, ...] = (
    _Unit(lambda op, x: op.Mul(x, inverse_root(op, x))),
    _Unit(lambda op, x: op.Div(x, root_mean_square(op, x))),
    _Narrow(),
    _Weight(),
    _Operator("RMSNormalization"),
    _Operator("SimplifiedLayerNormalization", _EPSILON),
)


@dataclass(frozen=True)
class FuseRmsNorm(Pass):
    """Turn root-mean-square norms over the last axis, however they are spelled, into one RMSNorm each.

    A norm without a weight gets a weight of ones. A weight that is multiplied in float32, before the result is cast to
    16 bits, makes a float32 norm between the casts: the results stay the same bit for bit.

    Before:
        s = Pow (x, two)
        m = ReduceMean <axes = [-1]> (s)
        a = Add (m, epsilon)
        r = Sqrt (a)
        i = Reciprocal (r)
        n = Mul (x, i)
        y = Mul (weight, n)
    After:
        y = onnxslim_llm.RMSNorm <epsilon> (x, weight)
    Skips when:
        - the model is older than opset 18 and cannot be converted;
        - epsilon is missing, not positive, or no single constant;
        - the mean is over other axes than the last one, or of something else than the square;
        - the mean is taken in another type than float32, or the type or the width is unknown;
        - an inner tensor is used elsewhere, or is an output of the graph;
        - the mean is subtracted first: that is a layer norm;
        - a weight is no vector of the width, or of another type: it stays a product of its own;
        - an RMSNormalization or SimplifiedLayerNormalization normalises more axes or does not compute in float32.
    """

    name: ClassVar[str] = "fuse_rms_norm"
    group: ClassVar[str] = "fuse"

    def apply(self, model: Model, context: Context) -> Change:
        """Fuse all norms; an older model is converted to opset 18 if there is one."""
        change = Change()
        if not ready(model, RULES, change):
            return change
        before = [node for _, node in calls(model, RMS_NORM)]
        old = {id(node) for node in before}
        change.extend(apply_rules(model, RULES))
        norms = [node for _, node in calls(model, RMS_NORM)]
        change.sites = [node.outputs[0].name for node in norms if id(node) not in old] or change.sites
        keep_skips_at_means(model, change, [node.outputs[0].name for node in norms])
        change.skipped = [skip for skip in change.skipped if _CENTRED not in skip.reason]  # for fuse_layer_norm
        return change


def _is_centred(x: gs.Tensor) -> bool:
    """Return whether x is z - mean(z)."""
    op = PatternBuilder()
    pattern = op.Sub(op.var("z"), op.ReduceMean(op.var("z"), _open_ended=True))
    producer = x.inputs[0] if isinstance(x, gs.Variable) and x.inputs else None
    return producer is not None and Matcher(lambda domain: 18, set()).find((pattern,), producer, True) is not None
