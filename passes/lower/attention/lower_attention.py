"""Attentions in the operators of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.attention import is_attention
from onnxslim_llm.concepts.concept import drop_unused_functions, inline_call, replace_nodes
from onnxslim_llm.concepts.opset import raise_opset
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.ir.topology import sort_nodes
from onnxslim_llm.passes.lower.attention.attention_call import AttentionCall
from onnxslim_llm.passes.lower.attention.attention_masks import Masks
from onnxslim_llm.passes.lower.attention.grouped_attention import (
    CONTRIB_DOMAIN,
    Lengths,
    grouped_attention,
    reason_against,
)
from onnxslim_llm.passes.lower.attention.input_sizes import InputSizes
from onnxslim_llm.passes.lower.attention.multi_head_attention import multi_head_attention, reason_against_multi_head
from onnxslim_llm.passes.lower.attention.standard_attention import FIRST_OPSET, STANDARD_OPSET, standard_attention
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.edit import Builder, detach, remove_dead
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass

__all__ = ["LowerAttention"]


@dataclass(frozen=True)
class LowerAttention(Pass):
    """Turn attentions into ai.onnx Attention, or into ONNX Runtime's GroupQueryAttention and MultiHeadAttention.

    The model is converted for ai.onnx Attention. What that operator cannot say itself (sliding windows) is said by its
    mask, which all layers share. A query whose keys are all hidden gives zeros, also where the mask consists of finite
    numbers and would have given a mean of the hidden.

    Before:
        Y, PK, PV = onnxslim_llm.Attention_Past_Present_Causal_Grouped <q_num_heads = 4, kv_num_heads = 2,
                    scale = 0.125> (Q, K, V, past_key, past_value)
    After:
        Y, PK, PV = Attention <is_causal = 1, q_num_heads = 4, kv_num_heads = 2, scale = 0.125> (Q, K, V, ,
                    past_key, past_value)

    Skips when:
        - operator is "contrib" and neither GroupQueryAttention nor MultiHeadAttention can express the attention (the
          cache is not returned, heads are grouped and it is not causal): it becomes ai.onnx Attention
        - it should become ai.onnx Attention, and the opset is below 23, because `opset` is or because the model cannot
          be converted: primitive operators take its place

    Attributes:
        operator: "standard": ai.onnx Attention, as fast or faster, and without restrictions. "contrib":
            com.microsoft.GroupQueryAttention for what is causal, MultiHeadAttention for the rest: older versions of
            ONNX Runtime know them as well. With a past the former runs several tokens at once only for a batch of one.
        opset: Version of ai.onnx that an older model is converted to.
    """

    name: ClassVar[str] = "lower_attention"
    group: ClassVar[str] = "lower"

    operator: Literal["standard", "contrib"] = "standard"
    opset: int = STANDARD_OPSET

    def apply(self, model: Model, context: Context) -> Change:
        """Replace all attentions."""
        change = Change()
        if not any(is_attention(node) for graph in model.graphs() for node in graph.nodes):
            return change
        raise_opset(model, change, self.opset)
        values = infer_shapes(model)
        sizes = InputSizes(model, values)
        replaced: dict[int, list[gs.Node]] = {}
        done: list[AttentionCall] = []
        for graph in model.graphs():
            masks, lengths = Masks(values, sizes), Lengths(sizes)
            for node in [node for node in graph.nodes if is_attention(node)]:
                call = AttentionCall.of(node, values)
                where = node.name or node.outputs[0].name
                op = Builder(model, where)
                results, against = self._lower(op, call, masks, lengths)
                if against:
                    change.skip(where, against)
                if results is None:
                    replaced[id(node)] = inline_call(model, node)
                else:
                    detach(node)
                    take_over(op.nodes, results, list(call.outputs.values()))
                    replaced[id(node)] = op.nodes
                done.append(call)
                change.sites.append(where)
        replace_nodes(model, replaced)
        finish(model, sizes, done)
        return change

    def _lower(
        self, op: Builder, call: AttentionCall, masks: Masks, lengths: Lengths
    ) -> tuple[tuple[gs.Tensor, ...] | None, str]:
        """Return the results, or None where the body must do; and why it is not the operator that was asked for."""
        against = ""
        if self.operator == "contrib":
            grouped, by_head = reason_against(call), reason_against_multi_head(call)
            if not grouped or not by_head:
                op.model.set_opset(CONTRIB_DOMAIN, 1)
                if grouped:
                    return multi_head_attention(op, call, masks), ""
                return grouped_attention(op, call, masks, lengths), ""
            against = f"GroupQueryAttention cannot express it: {grouped}; nor can MultiHeadAttention: {by_head}"
        if (op.model.opset() or 0) >= FIRST_OPSET:
            return standard_attention(op, call, masks), against
        inlined = f"opset {op.model.opset()} has no Attention: it becomes primitive operators"
        return None, "; ".join(filter(None, [against, inlined]))


def take_over(nodes: list[gs.Node], results: tuple[gs.Tensor, ...], outputs: list[gs.Variable]) -> None:
    """Let the new nodes make the old outputs."""
    for result, output in zip(results, outputs, strict=True):
        for node in nodes:
            for i, tensor in enumerate(node.outputs):
                if tensor is result:
                    node.outputs[i] = output
            for i, tensor in enumerate(node.inputs):
                if tensor is result:
                    node.inputs[i] = output


def finish(model: Model, sizes: InputSizes, calls: Iterable[AttentionCall]) -> None:
    """Put the nodes that read sizes first, and everything in order, without what made biases that are not read."""
    biases = [call.inputs["bias"] for call in calls if "bias" in call.inputs]
    producers = [tensor.inputs[0] for tensor in biases if isinstance(tensor, gs.Variable) and tensor.inputs]
    dead = {id(node) for node in remove_dead([*sizes.nodes, *producers], graph_output_ids(model))}
    for graph in model.graphs():
        graph.nodes[:] = [node for node in graph.nodes if id(node) not in dead]
    model.graph.nodes[:] = [*(node for node in sizes.nodes if id(node) not in dead), *model.graph.nodes]
    sort_nodes(model.graph)
    drop_unused_functions(model)
