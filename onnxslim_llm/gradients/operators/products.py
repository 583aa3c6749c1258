"""Matrix products and convolutions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxslim_llm.gradients.backend import torch
from onnxslim_llm.gradients.rule import Call, Rule

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RULES"]


def _gemm(call: Call) -> Tensor:
    a, b, c = call.input(0), call.input(1), call.optional(2)
    product = (a.T if call.attributes["transA"] else a) @ (b.T if call.attributes["transB"] else b)
    if call.attributes["alpha"] != 1:
        product = product * call.attributes["alpha"]
    if c is None:
        return product
    return product + (c if call.attributes["beta"] == 1 else c * call.attributes["beta"])


def _convolution(call: Call) -> Tensor:
    x, weight, bias = call.input(0), call.input(1), call.optional(2)
    rank = x.dim() - 2
    strides = list(call.attributes.get("strides") or [1] * rank)
    dilations = list(call.attributes.get("dilations") or [1] * rank)
    auto = call.attributes["auto_pad"]
    pads = list(call.attributes.get("pads") or [0] * (2 * rank))
    if auto.startswith("SAME"):
        pads = _same(x, weight, strides, dilations, lower=auto == "SAME_LOWER")
    flat = [pads[side * rank + axis] for axis in reversed(range(rank)) for side in (0, 1)]
    function = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[rank - 1]
    padded = torch.nn.functional.pad(x, flat) if any(flat) else x
    return function(padded, weight, bias, strides, 0, dilations, call.attributes["group"])


def _same(x: Tensor, weight: Tensor, strides: list[int], dilations: list[int], *, lower: bool) -> list[int]:
    begins, ends = [], []
    for size, kernel, stride, dilation in zip(x.shape[2:], weight.shape[2:], strides, dilations, strict=True):
        need = max(0, (-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size)
        begins.append(-(-need // 2) if lower else need // 2)
        ends.append(need - begins[-1])
    return begins + ends


RULES: dict[str, Rule] = {
    "Conv": _convolution,
    "Einsum": lambda call: torch.einsum(call.attributes["equation"], *call.given()),
    "Gemm": _gemm,
    "MatMul": lambda call: call.input(0) @ call.input(1),
}
