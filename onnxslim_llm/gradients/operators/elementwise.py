"""Operators that work on each element, with broadcasting."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING, Any

from onnxslim_llm.gradients.backend import torch
from onnxslim_llm.gradients.rule import Call, Rule
from onnxslim_llm.gradients.tensors import torch_type

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RULES"]

F = torch.nn.functional


def _unary(function: Callable[[Any], Any]) -> Rule:
    return lambda call: function(call.input(0))


def _binary(function: Callable[[Any, Any], Any]) -> Rule:
    return lambda call: function(call.input(0), call.input(1))


def _variadic(function: Callable[[Any, Any], Any]) -> Rule:
    return lambda call: reduce(function, call.given())


def _divide(call: Call) -> Tensor:
    a, b = call.input(0), call.input(1)
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _modulo(call: Call) -> Tensor:
    function = torch.fmod if call.attributes["fmod"] else torch.remainder
    return function(call.input(0), call.input(1))


def _power(call: Call) -> Tensor:
    base, exponent = call.input(0), call.input(1)
    # A number as the exponent is much faster than a tensor.
    found = base ** exponent.item() if exponent.numel() == 1 else base**exponent
    if found.dim() < exponent.dim():
        found = found.reshape((1,) * (exponent.dim() - found.dim()) + tuple(found.shape))
    return found.to(base.dtype)


def _mean(call: Call) -> Tensor:
    tensors = call.given()
    return reduce(torch.add, tensors) / len(tensors)


def _clip(call: Call) -> Tensor:
    x = call.input(0)
    low, high = call.optional(1), call.optional(2)
    if "min" in call.attributes or "max" in call.attributes:  # before opset 11
        return x.clamp(call.attributes.get("min"), call.attributes.get("max"))
    return x if low is None and high is None else x.clamp(low, high)


def _cast(call: Call) -> Tensor:
    return _convert(call.input(0), torch_type(call.attributes["to"]))


def _cast_like(call: Call) -> Tensor:
    return _convert(call.input(0), call.input(1).dtype)


def _convert(x: Tensor, dtype: Any) -> Tensor:
    if dtype is torch.bool:
        return x != 0
    return x.to(dtype)


def _gelu(call: Call) -> Tensor:
    return F.gelu(call.input(0), approximate=call.attributes["approximate"])


def _swish(call: Call) -> Tensor:
    x, alpha = call.input(0), call.attributes["alpha"]
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


def _hard_sigmoid(call: Call) -> Tensor:
    return (call.attributes["alpha"] * call.input(0) + call.attributes["beta"]).clamp(0, 1)


def _dropout(call: Call) -> list[Tensor]:
    x = call.input(0)  # inference: nothing is dropped
    return [x, torch.ones_like(x, dtype=torch.bool)][: call.outputs]


RULES: dict[str, Rule] = {
    "Abs": _unary(torch.abs),
    "Add": _binary(torch.add),
    "And": _binary(torch.logical_and),
    "BitwiseAnd": _binary(torch.bitwise_and),
    "BitwiseOr": _binary(torch.bitwise_or),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Ceil": _unary(torch.ceil),
    "Clip": _clip,
    "Cos": _unary(torch.cos),
    "Div": _divide,
    "Dropout": _dropout,
    "Elu": lambda call: F.elu(call.input(0), call.attributes["alpha"]),
    "Equal": _binary(torch.eq),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Floor": _unary(torch.floor),
    "Gelu": _gelu,
    "Greater": _binary(torch.gt),
    "GreaterOrEqual": _binary(torch.ge),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _unary(F.hardswish),
    "Identity": _unary(lambda x: x),
    "IsInf": _unary(torch.isinf),
    "IsNaN": _unary(torch.isnan),
    "LeakyRelu": lambda call: F.leaky_relu(call.input(0), call.attributes["alpha"]),
    "Less": _binary(torch.lt),
    "LessOrEqual": _binary(torch.le),
    "Log": _unary(torch.log),
    "Max": _variadic(torch.maximum),
    "Mean": _mean,
    "Min": _variadic(torch.minimum),
    "Mod": _modulo,
    "Mul": _binary(torch.mul),
    "Neg": _unary(torch.neg),
    "Not": _unary(torch.logical_not),
    "Or": _binary(torch.logical_or),
    "PRelu": _binary(lambda x, slope: torch.where(x > 0, x, x * slope)),
    "Pow": _power,
    "Reciprocal": _unary(torch.reciprocal),
    "Relu": _unary(torch.relu),
    "Round": _unary(torch.round),
    "Sigmoid": _unary(torch.sigmoid),
    "Sign": _unary(torch.sign),
    "Sin": _unary(torch.sin),
    "Softplus": _unary(F.softplus),
    "Sqrt": _unary(torch.sqrt),
    "Sub": _binary(torch.sub),
    "Sum": _variadic(torch.add),
    "Swish": _swish,
    "Tan": _unary(torch.tan),
    "Tanh": _unary(torch.tanh),
    "Where": lambda call: torch.where(call.input(0), call.input(1), call.input(2)),
    "Xor": _binary(torch.logical_xor),
}
