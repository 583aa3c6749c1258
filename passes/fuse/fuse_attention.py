"""Attention, however it is spelled, becomes one node."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.attention import AttentionForm, call_attention, is_attention
from onnxslim_llm.concepts.opset import CONCEPT_OPSET, raise_opset
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.ir.topology import sort_nodes
from onnxslim_llm.passes.fuse.attention.bias import emit_bias
from onnxslim_llm.passes.fuse.attention.products import NotAttentionError, reason_of
from onnxslim_llm.passes.fuse.attention.site import Site, Surroundings, read_site
from onnxslim_llm.rewrite.edit import Builder, inherit_metadata, remove_dead, replace_output
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["FuseAttention"]

#: Attentions that need no fusion.
_FUSED = {
    "": frozenset({"Attention"}),
    "com.microsoft": frozenset({"Attention", "GroupQueryAttention", "MultiHeadAttention", "SparseAttention"}),
}


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Replace attention, from the scores to the weighted values, by one node of the attention concept.

    Every Softmax is looked at: forward to the product with the values, backward through masks, softcap and scale to the
    product of queries and keys, and on through everything that only moves elements. Layouts, numbers of heads, repeated
    key and value heads and the scale follow from that, whatever the spelling. Masks are carried as they are, as one
    tensor that is added. A cache whose result is an output of the model becomes part of the node.

    Before:
        <ir_version: 8, opset_import: ["" : 18]>
        agraph (float[B, S, 64] q, float[B, S, 64] k, float[B, S, 64] v, float[B, 1, S, S] mask) => (float[B, S, 64] y)
        <int64[4] heads = {0, 0, 4, 16}, int64[3] flat = {0, 0, 64}, float scale = {0.25}>
        {
            q4 = Reshape (q, heads)
            k4 = Reshape (k, heads)
            v4 = Reshape (v, heads)
            qt = Transpose <perm = [0, 2, 1, 3]> (q4)
            kt = Transpose <perm = [0, 2, 3, 1]> (k4)
            vt = Transpose <perm = [0, 2, 1, 3]> (v4)
            products = MatMul (qt, kt)
            scaled = Mul (products, scale)
            masked = Add (scaled, mask)
            weights = Softmax <axis = -1> (masked)
            mixed = MatMul (weights, vt)
            back = Transpose <perm = [0, 2, 1, 3]> (mixed)
            y = Reshape (back, flat)
        }

    After:
        <ir_version: 8, opset_import: ["" : 18, "onnxslim_llm" : 1]>
        agraph (float[B, S, 64] q, float[B, S, 64] k, float[B, S, 64] v, float[B, 1, S, S] mask) => (float[B, S, 64] y)
        {
            y = onnxslim_llm.Attention_Bias <q_num_heads = 4, kv_num_heads = 4, scale = 0.25, softcap = 0.0, window = 0>
                (q, k, v, mask)
        }

    Skips when:
        - the Softmax runs over another axis than the last, or no product of two tensors leads to it
        - scores or weights are outputs of the model, or something else reads them
        - the scores are scaled after a softcap or after some were replaced, or by something else than one number
        - hidden scores are replaced by a number above -1e4
        - the weights are changed before they meet the values, by other things than a cast and NaN becoming 0
        - the scores change their type other than from 16 bits to float32 for the Softmax alone
        - double precision is scaled by a number that float32 does not have
        - ranks, types or sizes of operands are not known
    """

    name: ClassVar[str] = "fuse_attention"
    group: ClassVar[str] = "fuse"

    def apply(self, model: Model, context: Context) -> Change:
        """Fuse in the top graph and in its subgraphs."""
        raised = Change()
        if (model.opset() or 0) < CONCEPT_OPSET and _Work(model).finds_any() and not raise_opset(model, raised):
            return raised
        return _Work(model).run()


class _Work:
    def __init__(self, model: Model) -> None:
        self._model = model
        for graph in model.graphs():
            sort_nodes(graph)
        self._values = infer_shapes(model)
        self._outputs = graph_output_ids(model)
        self._change = Change()
        self._forms: Counter[str] = Counter()
        self._removed: dict[int, gs.Node] = {}

    def finds_any(self) -> bool:
        """Return whether there is an attention to fuse."""
        for graph in self._model.graphs():
            around = self._around(graph)
            for node in graph.nodes:
                if _is_softmax(node):
                    try:
                        read_site(node, around)
                    except NotAttentionError:
                        continue
                    return True
        return False

    def run(self) -> Change:
        """Fuse all attentions; return the account."""
        done = 0
        for graph in list(self._model.graphs()):
            around = self._around(graph)
            done += sum(_is_fused(node) for node in graph.nodes)
            fresh: dict[int, list[gs.Node]] = {}
            for node in list(graph.nodes):
                if not _is_softmax(node):
                    continue
                try:
                    site = read_site(node, around)
                except NotAttentionError as error:
                    self._change.skip(node.name or node.outputs[0].name, reason_of(error))
                    continue
                fresh[id(site.nodes[-1])] = self._fuse(site, graph)
            nodes = [new for node in graph.nodes for new in (*fresh.get(id(node), ()), node)]
            graph.nodes[:] = [node for node in nodes if id(node) not in self._removed]
            sort_nodes(graph)
        if self._forms:
            self._change.detail["forms"] = dict(sorted(self._forms.items()))
        if done:
            self._change.detail["fused_before"] = done
        return self._change

    def _around(self, graph: gs.Graph) -> Surroundings:
        positions = {id(node): place for place, node in enumerate(graph.nodes)}
        return Surroundings(self._values, self._outputs, positions, self._model.opset() or 0)

    def _fuse(self, site: Site, graph: gs.Graph) -> list[gs.Node]:
        last = site.nodes[-1]
        hint = last.name or last.outputs[0].name
        op = Builder(self._model, hint)
        bias = emit_bias(op, site.scores.masks, site.lifted, site.dtype)
        form = AttentionForm(
            heads_major=site.heads_major,
            past=site.caches is not None,
            present=site.caches is not None,
            bias=bias is not None,
            softcap=site.scores.softcap != 0,
            grouped=site.kv_number < site.heads.number,
            zero_rows=site.weights.zero_rows,
            float_softmax=site.float_softmax,
        )
        inputs = [operand.arrangement.emit(op, operand.tensor) for operand in (site.q, site.k, site.v)]
        inputs += [cache.past for cache in site.caches] if site.caches else []
        inputs += [bias] if bias is not None else []
        name = self._model.fresh_name(f"{hint}/Attention")
        made = [gs.Variable(self._model.fresh_name(f"{name}_output_{i}"), site.dtype) for i in range(len(form.outputs))]
        made[0].shape, made[0].inferred = site.shape, True
        node = call_attention(
            self._model,
            name,
            form,
            inputs,
            made,
            q_num_heads=site.heads.number,
            kv_num_heads=site.kv_number,
            scale=site.scale,
            softcap=site.scores.softcap,
        )
        op.nodes.append(node)
        result = site.result.arrangement.emit(op, made[0])
        for new in op.nodes:
            new.home = graph
        old = [site.result.tensor, *(cache.node.outputs[0] for cache in site.caches or ())]
        self._change.sites.append(old[0].name)
        self._forms[form.name] += 1
        producers: list[Any] = [tensor.inputs[0] for tensor in old]
        for before, after in zip(old, [result, *made[1:]], strict=True):
            replace_output(before, after, op.nodes, self._outputs)
        inherit_metadata(last, old[0])
        for gone in remove_dead([*producers, *site.nodes], self._outputs):
            self._removed[id(gone)] = gone
        return op.nodes


def _is_softmax(node: gs.Node) -> bool:
    return bool(node.op == "Softmax" and normal_domain(node.domain) == "")


def _is_fused(node: gs.Node) -> bool:
    return is_attention(node) or node.op in _FUSED.get(normal_domain(node.domain), ())
