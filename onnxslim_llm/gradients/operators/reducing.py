"""Operators over axes: sums, means, norms, softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from onnxslim_llm.gradients.backend import torch
from onnxslim_llm.gradients.rule import Call, Rule

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RULES"]

#: Since this opset the axis of Softmax is one axis; before, all from it on.
_ONE_AXIS = 13


def _reduce(function: Callable[[Any, list[int], bool], Any]) -> Rule:
    def rule(call: Call) -> Tensor:
        x, axes = call.input(0), call.numbers(1, "axes")
        if not axes:
            if call.attributes.get("noop_with_empty_axes"):
                return x
            axes = list(range(x.dim()))
        return function(x, axes, bool(call.attributes["keepdims"])) if axes else x

    return rule


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x


def _softmax(function: Callable[[Any, int], Any]) -> Rule:
    def rule(call: Call) -> Tensor:
        x, axis = call.input(0), call.attributes["axis"]
        if call.opset >= _ONE_AXIS:
            return function(x, axis)
        axis %= x.dim()
        flat = x.reshape(math.prod(x.shape[:axis]), -1)
        return function(flat, 1).reshape(x.shape)

    return rule


def _layer_norm(call: Call) -> list[Tensor]:
    x, axis = call.input(0), call.attributes["axis"]
    if call.outputs > 1:
        raise NotImplementedError("the outputs Mean and InvStdDev")
    sizes = list(x.shape[axis:])
    scale, bias = call.input(1), call.optional(2)
    if list(scale.shape) == sizes and (bias is None or list(bias.shape) == sizes):
        return [torch.nn.functional.layer_norm(x, sizes, scale, bias, call.attributes["epsilon"])]
    found = torch.nn.functional.layer_norm(x, sizes, eps=call.attributes["epsilon"]) * scale
    return [found if bias is None else found + bias]


def _rms_norm(call: Call) -> Tensor:
    x, scale = call.input(0), call.input(1)
    axes = list(range(call.attributes["axis"] % x.dim(), x.dim()))
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + call.attributes["epsilon"]) * scale


RULES: dict[str, Rule] = {
    "LayerNormalization": _layer_norm,
    "LogSoftmax": _softmax(torch.log_softmax),
    "RMSNormalization": _rms_norm,
    "ReduceL1": _reduce(lambda x, axes, keep: x.abs().sum(axes, keep)),
    "ReduceL2": _reduce(lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep)),
    "ReduceLogSumExp": _reduce(torch.logsumexp),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceProd": _reduce(_product),
    "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axes, keep, dtype=x.dtype)),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: x.square().sum(axes, keep)),
    "Softmax": _softmax(torch.softmax),
}
