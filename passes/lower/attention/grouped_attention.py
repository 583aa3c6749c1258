"""The attention concept as com.microsoft.GroupQueryAttention, measured equal in ONNX Runtime 1.31.

The operator counts the keys of each row by `seqlens_k`; padding on the left or in between is beyond that. So all rows
get T - 1, and the padding mask goes in as a bias: exact for every mask, and measured not slower.

Rotary embeddings stay nodes of their own: with do_rotary the operator takes the positions of a prompt from the first of
position_ids, and so turns the tokens of a prompt that is padded on the left by other angles.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.passes.lower.attention.attention_call import AttentionCall
from onnxslim_llm.passes.lower.attention.attention_masks import Masks
from onnxslim_llm.passes.lower.attention.input_sizes import InputSizes
from onnxslim_llm.rewrite.edit import Builder

__all__ = ["CONTRIB_DOMAIN", "Lengths", "grouped_attention", "reason_against"]

CONTRIB_DOMAIN = "com.microsoft"
_HEAD_MULTIPLE = 8  # refused at run time otherwise


class Lengths:
    """Makes seqlens_k [B] and total_sequence_length [1], int32, once for all layers of the same sizes."""

    def __init__(self, sizes: InputSizes) -> None:
        self._sizes = sizes
        self._made: dict[tuple[Any, ...], tuple[gs.Tensor, gs.Tensor]] = {}

    def of(self, op: Builder, call: AttentionCall) -> tuple[gs.Tensor, gs.Tensor]:
        """Return (seqlens_k, total_sequence_length)."""
        key = (call.batch, call.keys, call.columns)
        if key in self._made:
            return self._made[key]
        total = op.Cast(call.size(self._sizes, op, "keys"), to=TensorProto.INT32)
        last = op.Sub(total, np.array([1], np.int32))
        lengths = op.Expand(last, call.size(self._sizes, op, "batch"))
        for tensor in (total, last, lengths):
            tensor.dtype = np.dtype(np.int32)
        if self._sizes.of(call.batch) is not None and call.total(self._sizes) is not None:
            self._made[key] = (lengths, total)
        return lengths, total


def reason_against(call: AttentionCall) -> str:
    """Return why GroupQueryAttention cannot express a call, or ""."""
    form = call.form
    if not form.causal or not call.grows:
        return "it is not causal"
    if call.head_size is None or call.head_size != call.value_size:
        return "its key and value heads differ in size, or their sizes are not known"
    if not isinstance(call.head_size, int) or call.head_size % _HEAD_MULTIPLE:
        return f"heads of {call.head_size} are no multiple of {_HEAD_MULTIPLE}"
    if form.past and not form.present:
        return "its cache is not returned"
    if call.inputs["Q"].dtype not in (None, np.dtype(np.float32), np.dtype(np.float16)):
        return f"it computes in {call.inputs['Q'].dtype}"
    return ""


def grouped_attention(
    op: Builder,
    call: AttentionCall,
    masks: Masks,
    lengths: Lengths,
    scales: tuple[gs.Tensor, gs.Tensor] | None = None,
) -> tuple[gs.Tensor, ...]:
    """Return the results of a call, made by GroupQueryAttention.

    Args:
        op: Collects the nodes.
        call: The call; `reason_against` has nothing against it.
        masks: Makes its bias.
        lengths: Makes its lengths.
        scales: Of the keys and values [1, Hkv, 1, D] in an int8 cache: value = code * scale.
    """
    form = call.form
    bias = masks.full_bias(op, call, causal=False, window=0)
    seqlens, total = lengths.of(op, call)
    past = (call.inputs["past_key"], call.inputs["past_value"]) if form.past else (None, None)
    operands = [call.tokens_first(op, name) for name in ("Q", "K", "V")]
    quantized: dict[str, Any] = {}
    extra: list[gs.Tensor | None] = [None, None, None, bias]
    if scales is not None:
        extra += [None, *scales]
        quantized = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    while extra and extra[-1] is None:
        extra.pop()
    made, key, value = op.call(
        CONTRIB_DOMAIN,
        "GroupQueryAttention",
        *operands,
        *past,
        seqlens,
        total,
        *extra,
        _outputs=3,
        num_heads=call.q_heads,
        kv_num_heads=call.kv_heads,
        scale=call.scale,
        softcap=call.softcap or None,
        local_window_size=call.window or None,
        **quantized,
    )
    made.dtype = call.inputs["Q"].dtype
    result = call.heads_first(op, made)
    return (result, key, value) if form.present else (result,)
