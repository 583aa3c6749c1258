"""Operators whose results are new numbers: constants, ranges, positions of other elements."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxslim_llm.gradients.backend import torch
from onnxslim_llm.gradients.rule import Call, Rule
from onnxslim_llm.gradients.tensors import as_tensor
from onnxslim_llm.ir.weights import weight_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RULES"]

_NUMBERS = {
    "value_float": torch.float32,
    "value_int": torch.int64,
    "value_floats": torch.float32,
    "value_ints": torch.int64,
}


def _constant(call: Call) -> Tensor:
    for name, value in call.attributes.items():
        if name == "value":
            return as_tensor(weight_of(value).view())
        if name in _NUMBERS:
            return torch.tensor(value, dtype=_NUMBERS[name])
    raise NotImplementedError("a constant of strings")


def _constant_of_shape(call: Call) -> Tensor:
    sizes = call.numbers(0)
    assert sizes is not None
    value = call.attributes.get("value")
    one = torch.zeros(1) if value is None else as_tensor(weight_of(value).load())
    return one.reshape(()).expand(sizes).clone()


def _range(call: Call) -> Tensor:
    start, limit, delta = (call.input(i) for i in range(3))
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _one_hot(call: Call) -> Tensor:
    indices, depth, values = call.input(0).long(), int(call.input(1).item()), call.input(2)
    axis = call.attributes["axis"]
    on = torch.arange(depth) == (indices % depth).unsqueeze(-1)
    found = torch.where(on, values[1], values[0])
    return found if axis == -1 else found.movedim(-1, axis)


def _top_k(call: Call) -> list[Tensor]:
    count = call.numbers(1)
    assert count is not None
    values, indices = torch.topk(
        call.input(0), count[0], call.attributes["axis"], largest=bool(call.attributes["largest"])
    )
    return [values, indices]


def _cumulative(call: Call) -> Tensor:
    x, axis = call.input(0), int(call.input(1).item())
    if call.attributes["reverse"]:
        x = x.flip(axis)
    found = torch.cumsum(x, axis, dtype=x.dtype)
    if call.attributes["exclusive"]:
        found = found - x
    return found.flip(axis) if call.attributes["reverse"] else found


def _arg(largest: bool) -> Rule:
    function = torch.argmax if largest else torch.argmin

    def rule(call: Call) -> Tensor:
        if call.attributes.get("select_last_index"):
            raise NotImplementedError("select_last_index")
        return function(call.input(0), call.attributes["axis"], keepdim=bool(call.attributes["keepdims"]))

    return rule


RULES: dict[str, Rule] = {
    "ArgMax": _arg(largest=True),
    "ArgMin": _arg(largest=False),
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _cumulative,
    "NonZero": lambda call: torch.nonzero(call.input(0)).T,
    "OneHot": _one_hot,
    "Range": _range,
    "TopK": _top_k,
}
