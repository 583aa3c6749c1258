"""The attention concept as ai.onnx Attention (opset 23), measured equal in ONNX Runtime 1.31 for all forms."""

from __future__ import annotations

from typing import Any

import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.passes.lower.attention.attention_call import AttentionCall
from onnxslim_llm.passes.lower.attention.attention_masks import Masks
from onnxslim_llm.rewrite.edit import Builder

__all__ = ["FIRST_OPSET", "STANDARD_OPSET", "standard_attention"]

#: The first opset with the operator; ONNX Runtime computes the same for it.
FIRST_OPSET = 23
#: Version 24 of the operator tells a mask of T columns from a cache that holds more.
STANDARD_OPSET = 24


def standard_attention(op: Builder, call: AttentionCall, masks: Masks) -> tuple[gs.Tensor, ...]:
    """Return the results of a call, made by ai.onnx Attention.

    The operator has no window, and without a past it counts positions of the queries from the first key: where that is
    not meant, the mask says it.
    """
    form = call.form
    flag = form.causal and call.grows
    bias = masks.visible(op, call) if flag == form.causal else None
    if bias is None:
        bias = masks.full_bias(op, call, causal=form.causal and not flag, window=call.window)
    count = 3 if form.present or form.past else 1
    attributes: dict[str, Any] = {
        "is_causal": int(flag),
        "scale": call.scale,
        "softcap": call.softcap or None,
        "softmax_precision": TensorProto.FLOAT if form.float_softmax else None,
    }
    if not form.heads_major:
        attributes |= {"q_num_heads": call.q_heads, "kv_num_heads": call.kv_heads}
    past = (call.inputs["past_key"], call.inputs["past_value"]) if form.past else ()
    operands = [call.inputs["Q"], call.inputs["K"], call.inputs["V"], bias, *past]
    while operands[-1] is None:
        operands.pop()
    made = op.call("", "Attention", *operands, _outputs=count, **attributes)
    results = (made,) if count == 1 else made
    return results[: len(form.outputs)]
