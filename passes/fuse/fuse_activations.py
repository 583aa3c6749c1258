"""Gelu and Swish become one node each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.concepts.activation import GELU, GELU_TANH, SWISH
from onnxslim_llm.concepts.concept import Concept
from onnxslim_llm.passes.fuse.search import ready
from onnxslim_llm.rewrite.constants import constant_value
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.engine import apply_rules
from onnxslim_llm.rewrite.facts import onnx_type, rank_of
from onnxslim_llm.rewrite.matcher import Match
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.pattern import PatternBuilder, Wildcard
from onnxslim_llm.rewrite.rule import Refusal, Rule

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["FuseActivations"]

_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_CUBIC = 0.044715
_ROOT = math.sqrt(2 / math.pi)
#: Default of com.microsoft QuickGelu.
_QUICK = 1.702


class _Gelu(Rule):
    """x / 2 times a bracket, in one of the orders in which the three can be multiplied."""

    explain = True
    near = 4  # the bracket with its Erf or Tanh

    def __init__(
        self,
        concept: Concept,
        bracket: Callable[[PatternBuilder, Any], Any],
        order: Callable[[PatternBuilder, Any, Any], Any],
    ) -> None:
        self._concept, self._bracket, self._order = concept, bracket, order

    @property
    def name(self) -> str:
        return self._concept.name

    def pattern(self, op: PatternBuilder, x: Wildcard) -> Any:
        return self._order(op, x, self._bracket(op, x))

    def check(self, match: Match) -> Refusal | None:
        return _check_type(match) or _check_scalars(match)

    def rewrite(self, op: Builder, match: Match) -> gs.Tensor:
        return self._concept.build(op, match["x"])


class _Swish(Rule):
    """x * sigmoid(alpha * x)."""

    explain = True
    near = 3

    def __init__(self, spelling: Callable[[PatternBuilder, Any], Any]) -> None:
        self._spelling = spelling

    @property
    def name(self) -> str:
        return SWISH.name

    def pattern(self, op: PatternBuilder, x: Wildcard) -> Any:
        return self._spelling(op, x)

    def check(self, match: Match) -> Refusal | None:
        if "alpha" in match.tensors and match.scalar("alpha") is None:
            return Refusal("alpha is no single number", match["alpha"].name)
        return _check_type(match) or _check_scalars(match)

    def rewrite(self, op: Builder, match: Match) -> gs.Tensor:
        alpha = match.scalar("alpha") if "alpha" in match.tensors else 1.0
        return SWISH.build(op, match["x"], alpha=alpha)


class _Operator(Rule):
    """An operator that is one of the activations already."""

    def __init__(self, concept: Concept, op: str, domain: str, default: float | None = None, **attributes: Any) -> None:
        self._concept, self._op, self._domain, self._default = concept, op, domain, default
        self._attributes = attributes

    @property
    def name(self) -> str:
        return self._op

    def pattern(self, op: PatternBuilder, x: Wildcard) -> Any:
        attributes = dict(self._attributes)
        if self._default is not None:
            attributes["alpha"] = op.bind("alpha")
        return op.any_of(self._op)(x, _domain=self._domain, **attributes)

    def check(self, match: Match) -> Refusal | None:
        return _check_type(match)

    def rewrite(self, op: Builder, match: Match) -> gs.Tensor:
        if self._default is None:
            return self._concept.build(op, match["x"])
        alpha = match.attributes["alpha"]
        return self._concept.build(op, match["x"], alpha=self._default if alpha is None else alpha)


def _check_type(match: Match) -> Refusal | None:
    """Refuse double precision: the constants of the concepts are float32."""
    kind = onnx_type(match["x"])
    if kind is None:
        return Refusal("the type is unknown", match["x"].name)
    return None if kind in _TYPES else Refusal("it computes in another type than 16 or 32-bit floats", match["x"].name)


def _check_scalars(match: Match) -> Refusal | None:
    """Refuse constants that could broadcast the activation to another shape."""
    x = match["x"]
    for node in match.nodes.values():
        for tensor in node.inputs:
            value = constant_value(tensor) if tensor is not x else None
            if value is not None and (value.size != 1 or value.ndim > (rank_of(x) or 0)):
                return Refusal("a factor is no single number, or has more axes than the input", tensor.name)
    return None


def _halved(op: PatternBuilder, value: Any) -> Any:
    return op.either(op.Mul(value, 0.5), op.Div(value, 2.0))


#: x / 2 * bracket: where the half can be.
_ORDERS: tuple[Callable[[PatternBuilder, Any, Any], Any], ...] = (
    lambda op, x, bracket: op.Mul(op.Mul(bracket, x), 0.5),
    lambda op, x, bracket: op.Div(op.Mul(bracket, x), 2.0),
    lambda op, x, bracket: op.Mul(bracket, _halved(op, x)),
    lambda op, x, bracket: op.Mul(_halved(op, bracket), x),
)


def _erf_bracket(op: PatternBuilder, x: Any) -> Any:
    """1 + erf(x / sqrt(2))."""
    return op.Add(op.Erf(op.either(op.Div(x, math.sqrt(2)), op.Mul(x, math.sqrt(0.5)))), 1.0)


def _tanh_bracket(op: PatternBuilder, x: Any) -> Any:
    """1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)), or with x in front: sqrt(2 / pi) * x * (1 + 0.044715 x^2)."""
    square = op.either(op.Mul(x, x), op.Pow(x, 2.0))
    cube = op.either(op.Pow(x, 3.0), op.Mul(square, x))
    bent = op.Mul(x, _CUBIC)
    cubic = op.either(
        op.Mul(cube, _CUBIC), op.Mul(op.Mul(square, _CUBIC), x), op.Mul(bent, square), op.Mul(op.Mul(bent, x), x)
    )
    inner = op.Add(op.either(op.Mul(square, _CUBIC), op.Mul(bent, x)), 1.0)
    argument = op.either(
        op.Mul(op.Add(cubic, x), _ROOT),
        op.Mul(inner, op.Mul(x, _ROOT)),
        op.Mul(op.Mul(inner, _ROOT), x),
        op.Mul(op.Mul(inner, x), _ROOT),
    )
    return op.Add(op.Tanh(argument), 1.0)


RULES: tuple[Rule, ...] = (
    *(_Gelu(GELU, _erf_bracket, order) for order in _ORDERS),
    *(_Gelu(GELU_TANH, _tanh_bracket, order) for order in _ORDERS),
    _Swish(lambda op, x: op.Mul(op.Sigmoid(x), x)),
    _Swish(lambda op, x: op.Mul(op.Sigmoid(op.Mul(x, op.const("alpha"))), x)),
    _Swish(lambda op, x: op.Div(x, op.Add(op.Exp(op.Neg(x)), 1.0))),
    _Operator(GELU, "Gelu", "", approximate=lambda value: value == "none"),
    _Operator(GELU_TANH, "Gelu", "", approximate=lambda value: value == "tanh"),
    _Operator(SWISH, "Swish", "", default=1.0),
    _Operator(GELU, "Gelu", "com.microsoft"),
    _Operator(GELU_TANH, "FastGelu", "com.microsoft"),
    _Operator(SWISH, "QuickGelu", "com.microsoft", default=_QUICK),
)


@dataclass(frozen=True)
class FuseActivations(Pass):
    """Turn Gelu (by erf and by tanh), SiLU and the quick Gelu, however they are spelled, into one node each.

    Before:
        d = Div (x, root_of_two)
        e = Erf (d)
        s = Add (e, one)
        p = Mul (x, s)
        y = Mul (p, half)
    After:
        y = onnxslim_llm.Gelu (x)
    Skips when:
        - the model is older than opset 18 and cannot be converted;
        - a factor is another number, differs by element, or has more axes than the input;
        - it is computed in float64, whose digits the constants of the concepts do not have, or the type is unknown;
        - an inner tensor is used elsewhere, or is an output of the graph;
        - it is a HardSwish, a Swish whose alpha is no constant, or a FastGelu with a bias.
    """

    name: ClassVar[str] = "fuse_activations"
    group: ClassVar[str] = "fuse"

    def apply(self, model: Model, context: Context) -> Change:
        """Fuse all activations; an older model is converted to opset 18 if there is one."""
        change = Change()
        if not ready(model, RULES, change):
            return change
        change.extend(apply_rules(model, RULES))
        return change
