"""The quantizer that a pass prepares weights for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxslim_llm.passes.quantize.quantize_weights import QuantizeWeights

if TYPE_CHECKING:
    from onnxslim_llm.rewrite.context import Context

__all__ = ["following_quantizer"]


def following_quantizer(context: Context) -> QuantizeWeights | None:
    """Return the quantize_weights that comes after this pass, if there is one."""
    return next((step for step in context.following if isinstance(step, QuantizeWeights)), None)
