"""Masks of attentions become flags, and what is left of them is computed once for all layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.concepts.attention import AttentionForm, attention_form, call_attention, is_attention
from onnxslim_llm.concepts.concept import drop_unused_functions, replace_nodes
from onnxslim_llm.ir.shapes import SymbolicValues, infer_shapes
from onnxslim_llm.ir.topology import sort_nodes
from onnxslim_llm.passes.fuse.masks.axes import attention_axes
from onnxslim_llm.passes.fuse.masks.meaning import PaddingRule, Unclear
from onnxslim_llm.passes.fuse.masks.points import Axes
from onnxslim_llm.passes.fuse.masks.proof import Proven, prove_mask
from onnxslim_llm.passes.fuse.masks.terms import Split, split_bias
from onnxslim_llm.rewrite.edit import Builder, detach, remove_dead
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["SimplifyMasks"]


@dataclass(frozen=True)
class SimplifyMasks(Pass):
    """Replace the computed mask of an attention by what it means: causal, sliding window, padding of the keys.

    What a mask means is proven by computing it for all sizes that matter. What is left is one bias [B, 1, 1, T] of
    the padding mask, three nodes for all layers; a mask that hides nothing goes. Biases that are no masks (ALiBi,
    relative positions) stay, without the mask that was added to them. Rows whose own token is padding, and that attend
    to nothing, may come out different: exporters differ there, and nobody looks at them.

    Before:
        row = Range (past, total, one)
        column = Range (zero, total, one)
        row_column = Unsqueeze (row, last)
        causal = LessOrEqual (column, row_column)
        padding = Cast <to = 9> (attention_mask)
        padding_4d = Unsqueeze (padding, middle)
        visible = And (causal, padding_4d)
        bias = Where (visible, nothing, lowest)
        y = onnxslim_llm.Attention_Past_Bias (q, k, v, past_key, past_value, bias)

    After:
        padding = Cast <to = 9> (attention_mask)
        bias = Where (padding, nothing, lowest)
        bias_4d = Unsqueeze (bias, middle)
        y = onnxslim_llm.Attention_Past_Bias_Causal (q, k, v, past_key, past_value, bias_4d)

    Skips when:
        - the mask is no causal, sliding or padding mask, or one of another kind (bidirectional windows, blocks)
        - it depends on anything but sizes and one padding mask [B, T]: position ids, the text, several masks
        - its computation holds operators other than comparisons, logic, sums, data movement, or multiplies positions
        - the sizes of the attention are not known as expressions of the input sizes
        - the attention is in a subgraph
        - it says what it means already
    """

    name: ClassVar[str] = "simplify_masks"
    group: ClassVar[str] = "fuse"

    def apply(self, model: Model, context: Context) -> Change:
        """Simplify the biases of the top graph's attentions."""
        change = Change()
        sites = [(g, n) for g in model.graphs() for n in g.nodes if is_attention(n) and attention_form(n).bias]
        if not sites:
            return change
        work = _Work(model, infer_shapes(model))
        for graph, node in sites:
            where = node.outputs[0].name
            reason = "it is in a subgraph" if graph is not model.graph else work.simplify(node)
            if reason:
                change.skip(where, reason)
            else:
                change.sites.append(where)
        work.finish()
        return change


class _Work:
    """The state of one application: proofs and biases are shared by all layers."""

    def __init__(self, model: Model, values: SymbolicValues) -> None:
        self.model = model
        self.values = values
        self._proofs: dict[tuple[int, Axes], Proven | Unclear] = {}
        self._biases: dict[tuple[Any, ...], gs.Tensor] = {}
        self._fresh: list[gs.Node] = []
        self._replaced: dict[int, list[gs.Node]] = {}
        self._old: list[gs.Node] = []
        self._dropped: list[gs.Tensor] = []

    def simplify(self, node: gs.Node) -> str:
        """Put a simpler attention in the place of `node`; return "" or why not."""
        form = attention_form(node)
        bias = node.inputs[form.inputs.index("bias")]
        axes = attention_axes(self.values, node, form)
        if isinstance(axes, str):
            return axes
        split = split_bias(bias, lambda tensor: self._prove(tensor, axes))
        reasons = "; ".join(dict.fromkeys(split.reasons))
        if not split.masks:
            return reasons
        readings = [proven.reading for proven in split.masks]
        window = int(node.attrs["window"]) if form.window else 0
        windows = [w for w in (window, *(r.window for r in readings)) if w]
        causal = form.causal or any(r.causal for r in readings)
        parts = self._parts(split, np.dtype(bias.dtype), form.zero_rows)
        same = causal == form.causal and min(windows, default=0) == window
        if same and all(self._is_minimal(proven) for proven in split.masks):
            return reasons or "it says what it means already"
        simpler = replace(form, causal=causal, window=bool(windows), bias=bool(parts))
        self._put(node, simpler, bias, parts, min(windows, default=0))
        return ""

    def _prove(self, tensor: gs.Tensor, axes: Axes) -> Proven | Unclear:
        key = (id(tensor), axes)
        if key not in self._proofs:
            self._proofs[key] = prove_mask(self.model, self.values, axes, tensor)
        return self._proofs[key]

    def _parts(self, split: Split, dtype: np.dtype[Any], zero_rows: bool) -> list[gs.Tensor]:
        """Return the tensors whose sum is the new bias."""
        made: dict[int, gs.Tensor] = {}
        for proven in split.masks:
            if proven.padding is not None:
                # Rows of -inf are zeros only in forms that say so; NaN in a row of padding would spread.
                low = proven.reading.low if zero_rows else max(proven.reading.low, float(np.finfo(dtype).min))
                bias = self._padding_bias(proven, proven.padding, low, dtype)
                made[id(bias)] = bias
        return [*split.rest, *made.values()]

    def _padding_bias(self, proven: Proven, padding: gs.Variable, low: float, dtype: np.dtype[Any]) -> gs.Tensor:
        reading = proven.reading
        key = (id(padding), reading.padding, low, dtype)
        if key not in self._biases:
            op = Builder(self.model, f"{padding.name}/bias")
            visible = _visible(op, padding, reading.padding)
            values = op.Where(visible, np.zeros((), dtype), np.array(low, dtype))
            self._biases[key] = op.Unsqueeze(values, [1, 2])
            for node in op.nodes:
                node.outputs[0].dtype = dtype if node.op in ("Where", "Unsqueeze") else np.dtype(bool)
            self._fresh += op.nodes
        return self._biases[key]

    def _is_minimal(self, proven: Proven) -> bool:
        """Return whether a mask is the bias of a padding mask, as small and as cheap as ours."""
        shape = self.values.shape_of(proven.mask)
        small = shape is not None and all(dim == 1 for dim in shape[-3:-1])
        return small and proven.padding is not None and proven.nodes <= _PADDING_NODES

    def _put(self, node: gs.Node, form: AttentionForm, bias: gs.Tensor, parts: list[gs.Tensor], window: int) -> None:
        op = Builder(self.model, f"{node.name or node.outputs[0].name}/bias")
        tensors = [t for t in node.inputs if t is not bias]
        if parts:
            total = parts[0]
            for part in parts[1:]:
                total = op.Add(total, part)
                total.dtype = bias.dtype
            tensors.append(total)
        outputs, attrs, name = list(node.outputs), dict(node.attrs), node.name
        detach(node)
        call = call_attention(
            self.model,
            name,
            form,
            tensors,
            outputs,
            q_num_heads=int(attrs["q_num_heads"]),
            kv_num_heads=int(attrs["kv_num_heads"]),
            scale=float(attrs["scale"]),
            softcap=float(attrs["softcap"]),
            window=window,
        )
        self._replaced[id(node)] = [*op.nodes, call]
        self._old.append(node)
        self._dropped.append(bias)

    def finish(self) -> None:
        """Put the new nodes into the graph and take out what nobody reads any more."""
        if not self._old:
            return
        graph = self.model.graph
        replace_nodes(self.model, self._replaced)
        graph.nodes[:] = [*self._fresh, *graph.nodes]
        producers = [t.inputs[0] for t in self._dropped if isinstance(t, gs.Variable) and t.inputs]
        gone = _ids(remove_dead(producers, graph_output_ids(self.model)))
        graph.nodes[:] = [node for node in graph.nodes if id(node) not in gone]
        sort_nodes(graph)
        drop_unused_functions(self.model)


#: Cast, Where, Unsqueeze: what the bias of a padding mask takes.
_PADDING_NODES = 3


def _visible(op: Builder, padding: gs.Variable, rule: PaddingRule | None) -> gs.Tensor:
    """Return the padding mask as booleans, true where a key is visible."""
    if padding.dtype == np.bool_:
        return padding
    seen: gs.Variable
    if rule == "one":
        seen = op.Equal(padding, np.ones((), padding.dtype))
    elif rule == "positive":
        seen = op.Greater(padding, np.zeros((), padding.dtype))
    else:
        seen = op.Cast(padding, to=TensorProto.BOOL)
    return seen


def _ids(nodes: Iterable[gs.Node]) -> set[int]:
    return {id(node) for node in nodes}
