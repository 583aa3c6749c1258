"""The attention concept as com.microsoft.MultiHeadAttention, for what is not causal."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.passes.lower.attention.attention_call import AttentionCall
from onnxslim_llm.passes.lower.attention.attention_masks import Masks
from onnxslim_llm.passes.lower.attention.grouped_attention import CONTRIB_DOMAIN
from onnxslim_llm.rewrite.edit import Builder

__all__ = ["multi_head_attention", "reason_against_multi_head"]


def reason_against_multi_head(call: AttentionCall) -> str:
    """Return why MultiHeadAttention cannot express a call, or ""."""
    if call.q_heads != call.kv_heads:
        return "it has fewer heads of keys than of queries"
    if call.softcap:
        return "its scores are capped"
    if call.form.past and not call.form.present:
        return "its cache is not returned"
    if call.inputs["Q"].dtype not in (None, np.dtype(np.float32)):
        return f"it computes in {call.inputs['Q'].dtype}"
    return ""


def multi_head_attention(op: Builder, call: AttentionCall, masks: Masks) -> tuple[gs.Tensor, ...]:
    """Return the results of a call, made by MultiHeadAttention; what the form hides, the bias hides."""
    form = call.form
    bias = masks.full_bias(op, call, causal=form.causal, window=call.window)
    past = (call.inputs["past_key"], call.inputs["past_value"]) if form.past else (None, None)
    operands = [*(call.tokens_first(op, name) for name in ("Q", "K", "V")), None, None, bias, *past]
    while operands[-1] is None:
        operands.pop()
    count = 3 if form.present else 1
    made = op.call(
        CONTRIB_DOMAIN, "MultiHeadAttention", *operands, _outputs=count, num_heads=call.q_heads, scale=call.scale
    )
    results = (made,) if count == 1 else made
    results[0].dtype = call.inputs["Q"].dtype
    return (call.heads_first(op, results[0]), *results[1:])
