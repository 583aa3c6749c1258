"""KV caches that grow in place, in float or int8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.attention import attention_form, is_attention
from onnxslim_llm.concepts.concept import replace_nodes
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.metadata import IN_PLACE_CACHE, set_metadata
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.shapes import SymbolicValues, infer_shapes
from onnxslim_llm.passes.lower.attention.attention_call import AttentionCall
from onnxslim_llm.passes.lower.attention.attention_masks import Masks
from onnxslim_llm.passes.lower.attention.grouped_attention import (
    CONTRIB_DOMAIN,
    Lengths,
    grouped_attention,
    reason_against,
)
from onnxslim_llm.passes.lower.attention.input_sizes import InputSizes
from onnxslim_llm.passes.lower.attention.lower_attention import finish, take_over
from onnxslim_llm.rewrite.edit import Builder, detach, redirect
from onnxslim_llm.rewrite.passes import Change, Pass

if TYPE_CHECKING:
    from onnxslim_llm.rewrite.context import Context

__all__ = ["CAPACITY", "LowerKvCache"]

#: Name of the cache's axis that holds more than the tokens seen so far.
CAPACITY = "max_sequence_length"

_TODO = "use --kv-cache separate"
_SEQUENCE_AXIS = 2
_INT8_LARGEST = 127


@dataclass(frozen=True)
class LowerKvCache(Pass):
    """Let past and present be one buffer that GroupQueryAttention extends in place.

    Inputs and outputs keep their names and order. The cache inputs [B, H, P, D] become buffers [B, H, capacity, D] of
    any capacity that holds the tokens; the caller binds each present output to the memory of its past input. How many
    tokens there are is the last axis of the attention mask. Padding may be anywhere, as before. Several tokens at once
    with a past run only for a batch of one.

    Before:
        Y, present_key, present_value = onnxslim_llm.Attention_Past_Present_Causal (Q, K, V, past_key, past_value)
    After:
        Y, present_key, present_value = com.microsoft.GroupQueryAttention (Q, K, V, past_key, past_value, seqlens_k,
                                        total_sequence_length)

    Skips when:
        - an attention has no cache.

    Attributes:
        cache: "shared": as it is. "int8": keys and values are stored as int8 with a scale for each channel, from the
            largest magnitudes on sample tokens: a quarter of the memory.
    """

    name: ClassVar[str] = "lower_kv_cache"
    group: ClassVar[str] = "lower"
    lossless: ClassVar[bool] = False  # asked for: the compile fails rather than go on without it

    cache: Literal["shared", "int8"] = "shared"

    @property
    def wants_cache_ranges(self) -> bool:
        """Whether `Context.cache_ranges` must be there."""
        return self.cache == "int8"

    def apply(self, model: Model, context: Context) -> Change:
        """Lower all attentions that have a cache.

        Raises:
            UsageError: There is no cache, or it cannot grow in place; the attention is named.
        """
        change = Change()
        nodes = [node for node in model.graph.nodes if is_attention(node)]
        cached = [node for node in nodes if attention_form(node).past and attention_form(node).present]
        if not cached:
            todo = f"compile with a recipe that fuses attention, or {_TODO}"
            raise UsageError("there is no attention with a KV cache", where="--kv-cache", todo=todo)
        for node in nodes:
            if not any(node is other for other in cached):
                change.skip(node.name or node.outputs[0].name, "it has no cache")
        values = infer_shapes(model)
        sizes = InputSizes(model, values)
        calls = [AttentionCall.of(node, values) for node in cached]
        sizes.hidden = {id(call.inputs[name]) for call in calls for name in ("past_key", "past_value")}
        for call in calls:
            reason = _reason_against(model, call, sizes)
            if reason:
                where = call.node.name or call.node.outputs[0].name
                raise UsageError(f"this KV cache cannot grow in place: {reason}", where=where, todo=_TODO)
        masks, lengths = Masks(values, sizes), Lengths(sizes)
        replaced: dict[int, list[gs.Node]] = {}
        for call in calls:
            where = call.node.name or call.outputs["Y"].name
            op = Builder(model, where)
            scales = self._scales(op, call, context) if self.cache == "int8" else None
            results = grouped_attention(op, call, masks, lengths, scales)
            detach(call.node)
            take_over(op.nodes, results, list(call.outputs.values()))
            replaced[id(call.node)] = op.nodes
            change.sites.append(where)
        replace_nodes(model, replaced)
        for call in calls:
            self._declare(model, call, values, sizes)
        model.set_opset(CONTRIB_DOMAIN, 1)
        set_metadata(model, IN_PLACE_CACHE, self.cache)
        finish(model, sizes, calls)
        change.detail["cache"] = self.cache
        return change

    def _scales(self, op: Builder, call: AttentionCall, context: Context) -> tuple[gs.Tensor, gs.Tensor]:
        made = []
        for name in ("present_key", "present_value"):
            output = call.outputs[name].name
            largest = (context.cache_ranges or {}).get(output)
            if largest is None:
                what = f"there are no ranges of '{output}' to choose int8 scales from"
                raise UsageError(what, where="--kv-cache int8", todo="use --kv-cache shared")
            scale = np.maximum(largest.astype(np.float32), np.finfo(np.float32).tiny) / _INT8_LARGEST
            made.append(op.constant(scale.reshape(1, largest.shape[0], 1, largest.shape[1]), f"{output}/scale"))
        return made[0], made[1]

    def _declare(self, model: Model, call: AttentionCall, values: SymbolicValues, sizes: InputSizes) -> None:
        """Give past and present their new shape and type, and let nothing read the buffer's size."""
        for past, present in (("past_key", "present_key"), ("past_value", "present_value")):
            tensor, output = call.inputs[past], call.outputs[present]
            for node in [n for n in tensor.outputs if n.op == "Shape"]:
                _replace_shape(model, node, call, values, sizes)
            for each in (tensor, output):
                shape = list(each.shape or tensor.shape)
                shape[_SEQUENCE_AXIS] = CAPACITY
                each.shape = shape
                output.__dict__.pop("derived_shape", None)
                if self.cache == "int8":
                    each.dtype = np.dtype(np.int8)


def _reason_against(model: Model, call: AttentionCall, sizes: InputSizes) -> str:
    against = reason_against(call)
    if against:
        return against
    inputs, outputs = {id(t) for t in model.graph.inputs}, {id(t) for t in model.graph.outputs}
    for past, present in (("past_key", "present_key"), ("past_value", "present_value")):
        tensor, output = call.inputs[past], call.outputs[present]
        if id(tensor) not in inputs or id(output) not in outputs:
            return f"'{tensor.name}' and '{output.name}' are no input and output of the model"
        if output.outputs:
            return f"'{output.name}' is read by '{output.outputs[0].op}', too"
        for node in tensor.outputs:
            if node is not call.node and node.op != "Shape":
                return f"'{tensor.name}' is read by '{node.op}', too"
    if call.total(sizes) is None:
        return "no input says how many tokens there are, as an attention mask [batch, past + sequence] does"
    if sizes.of(call.queries) is None or sizes.of(call.batch) is None:
        return "no input has the sizes of batch and sequence"
    return ""


def _replace_shape(model: Model, node: gs.Node, call: AttentionCall, values: SymbolicValues, sizes: InputSizes) -> None:
    """Let Shape of a cache say what it said before: the number of past tokens, not the capacity."""
    shape = values.shape_of(node.inputs[0])
    assert shape is not None
    end = node.attrs.get("end")
    axes = range(len(shape))[slice(int(node.attrs.get("start", 0)), None if end is None else int(end))]
    parts = []
    for axis in axes:
        if axis == _SEQUENCE_AXIS:
            parts.append(sizes.difference(call.total(sizes), sizes.of(call.queries)))
        else:
            parts.append(sizes.of(shape[axis]) or sizes.of(call.batch))
    redirect(node.outputs[0], sizes.concatenated([part for part in parts if part is not None]))
    detach(node)
    model.graph.nodes[:] = [n for n in model.graph.nodes if n is not node]
