"""QuantizeLinear and DequantizeLinear, so that gradients reach scales, and codes that come as floats.

Codes are floats between the two: rounding has the gradient of the identity within the codes' range, and none outside of
it (the straight-through estimator of Bengio et al. 2013, arXiv 1308.3432).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import TensorProto

from onnxslim_llm.gradients.backend import torch
from onnxslim_llm.gradients.rule import Call, Rule
from onnxslim_llm.gradients.tensors import onnx_type_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RULES"]

_RANGES: dict[int, tuple[int, int]] = {
    TensorProto.INT2: (-2, 1),
    TensorProto.UINT2: (0, 3),
    TensorProto.INT4: (-8, 7),
    TensorProto.UINT4: (0, 15),
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT8: (0, 255),
    TensorProto.INT16: (-32768, 32767),
    TensorProto.UINT16: (0, 65535),
}


def _spread(parameter: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """Return scales or zero points so that they broadcast to x: one number, one for each index, or one a block."""
    if parameter.numel() == 1 and parameter.dim() <= 1:
        return parameter.reshape(())
    axis %= x.dim()
    if not block:
        return parameter.reshape([-1 if i == axis else 1 for i in range(x.dim())])
    return parameter.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])


def _dequantize(call: Call) -> Tensor:
    codes, scale, zero = call.input(0), call.input(1), call.optional(2)
    axis, block = call.attributes.get("axis", 1), call.attributes.get("block_size", 0)
    floats = codes.to(scale.dtype)
    if zero is not None:
        floats = floats - _spread(zero.to(scale.dtype), codes, axis, block)
    return floats * _spread(scale, codes, axis, block)


def _quantize(call: Call) -> Tensor:
    x, scale, zero = call.input(0), call.input(1), call.optional(2)
    axis, block = call.attributes.get("axis", 1), call.attributes.get("block_size", 0)
    low, high = _code_range(call, zero)
    scaled = x / _spread(scale, x, axis, block)
    rounded = scaled + (torch.round(scaled) - scaled).detach()
    if zero is not None:
        rounded = rounded + _spread(zero.to(x.dtype), x, axis, block)
    return rounded.clamp(low, high)


def _code_range(call: Call, zero: Tensor | None) -> tuple[int, int]:
    kind = call.attributes.get("output_dtype") or (call.types[2] if len(call.types) > 2 else None)
    kind = kind or (TensorProto.UINT8 if zero is None else onnx_type_of(zero))
    if kind not in _RANGES:
        raise NotImplementedError(f"codes of type {TensorProto.DataType.Name(kind)}")
    return _RANGES[kind]


RULES: dict[str, Rule] = {"DequantizeLinear": _dequantize, "QuantizeLinear": _quantize}
