"""A decoder that reads the whole text in every run gets a KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.attention import AttentionForm, attention_form, call_attention, is_attention
from onnxslim_llm.concepts.concept import drop_unused_functions
from onnxslim_llm.concepts.rotary import ROTARY
from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.shapes import SymbolicValues, infer_shapes
from onnxslim_llm.ir.shapes.dims import Expr
from onnxslim_llm.ir.topology import sort_nodes
from onnxslim_llm.passes.fuse.tokens.axes import ELEMENTWISE, MixesTokensError, TokenAxes
from onnxslim_llm.passes.fuse.tokens.growing_text import GrowingText
from onnxslim_llm.passes.fuse.tokens.whole_text import Lengths, WholeText, depends_on
from onnxslim_llm.rewrite.edit import Builder, detach, remove_dead
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["AddKvCache"]

_PAST = "past_sequence_length"
#: Inputs with something for each token that a run gets; the mask covers the whole text instead.
_TOKEN_INPUTS = ("input_ids", "position_ids", "token_type_ids")
_MASK = "attention_mask"
#: Input slots that take sizes: what they get is computed from the tokens of the run.
_SIZE_SLOTS = {"Reshape": (1,), "Expand": (1,), "Slice": (1, 2, 3, 4), "Tile": (1,), "Split": (1,)}


@dataclass(frozen=True)
class AddKvCache(Pass):
    """Give a decoder without a KV cache one: inputs past_key_values.N.key and .value, outputs present.N.key and .value.

    A run then gets only the tokens that are new. Positions start where the cache ends, attention_mask covers cache and
    new tokens, [B, P + S]. What the model computes from sizes and masks alone is computed for the whole text and cut.
    That nothing but attentions lets a token see others is proven operator by operator; fuse_attention and
    simplify_masks have to run before.

    Before:
        y = onnxslim_llm.Attention_Causal (q, k, v)
    After:
        y, present.0.key, present.0.value =
            onnxslim_llm.Attention_Past_Present_Causal (q, k, v, past_key_values.0.key, past_key_values.0.value)

    Skips when:
        - the model has a KV cache already.

    Refuses, with an error, when:
        - it is no decoder: it has other inputs than input_ids, attention_mask, position_ids and token_type_ids
        - there is no fused attention, or one that is not known to be causal
        - an operator mixes tokens, or is not known not to
        - a mask or a position depends on the text itself
        - positions or angles of earlier tokens change when the text grows (rotary factors that depend on the length)
        - the number of tokens is fixed.
    """

    name: ClassVar[str] = "add_kv_cache"
    group: ClassVar[str] = "fuse"

    def apply(self, model: Model, context: Context) -> Change:
        """Add the cache.

        Raises:
            ModelError: The model cannot get one; says why.
        """
        change = Change()
        attentions = [node for node in model.graph.nodes if is_attention(node)]
        if any(attention_form(node).past for node in attentions):
            change.skip(model.graph.name or "the model", "it has a KV cache already")
            return change
        sort_nodes(model.graph)
        values = infer_shapes(model)
        try:
            _Work(model, values, attentions).run()
        except MixesTokensError as error:
            raise ModelError(
                f"the model cannot get a KV cache: {error.reason}",
                where=error.where,
                todo="compile without --add-kv-cache, or export the model with its cache",
            ) from error
        change.sites = [node.name or node.outputs[0].name for node in attentions]
        change.detail["layers"] = len(attentions)
        return change


class _Work:
    def __init__(self, model: Model, values: SymbolicValues, attentions: list[gs.Node]) -> None:
        self._model, self._graph, self._values, self._attentions = model, model.graph, values, attentions
        self._first = attentions[0] if attentions else gs.Node("Attention", "the model")
        self._ids, self._mask, roots = self._inputs()
        dims = values.shape_of(self._ids)
        if dims is None or len(dims) != 2 or not isinstance(dims[1], Expr):
            raise self._refusal("the number of tokens is fixed, or not known")
        self._length = dims[1]
        if self._mask is not None and values.shape_of(self._mask) != dims:
            raise self._refusal(f"'{self._mask.name}' is not [batch, tokens] like '{self._ids.name}'")
        if not attentions:
            raise self._refusal("no attention was recognised in it")
        self._check_causal()
        self._axes = TokenAxes(self._graph, values, roots, dims[0], self._length)
        for output in self._graph.outputs:
            if self._axes.of(output) is None:
                raise self._refusal(f"output '{output.name}' does not depend on the text")

    def _refusal(self, reason: str) -> MixesTokensError:
        return MixesTokensError(reason, self._first)

    def _inputs(self) -> tuple[gs.Tensor, gs.Tensor | None, list[gs.Tensor]]:
        by_name = {tensor.name: tensor for tensor in self._graph.inputs}
        strange = [name for name in by_name if name not in (*_TOKEN_INPUTS, _MASK)]
        if strange:
            raise self._refusal(f"it has the input '{strange[0]}'")
        if _TOKEN_INPUTS[0] not in by_name:
            raise self._refusal(f"it has no input '{_TOKEN_INPUTS[0]}'")
        roots = [by_name[name] for name in _TOKEN_INPUTS if name in by_name]
        return roots[0], by_name.get(_MASK), roots

    def _check_causal(self) -> None:
        for node in self._attentions:
            if not attention_form(node).causal:
                raise MixesTokensError("an attention is not known to be causal", node)

    def run(self) -> None:
        op = Builder(self._model, "cache")
        caches = [self._cache(layer, node) for layer, node in enumerate(self._attentions)]
        lengths = Lengths(op, caches[0][0], self._ids, self._mask)
        text = WholeText(op, self._values, self._length, lengths, self._mask, lambda t: self._axes.of(t) is not None)
        # First all new tensors, while the graph is as it was; then all changes.
        replaced = [(node, index, new) for node, index, new in self._replacements(text)]
        original = [(node, index) for node in self._graph.nodes for index in self._reads_mask(node)]
        for node, index, new in replaced:
            node.inputs[index] = new
        if self._mask is not None:
            self._cut_mask(op, lengths, [place for place in original if self._reads(place)])
        attentions = [self._with_cache(node, *cache) for node, cache in zip(self._attentions, caches, strict=True)]
        old = {id(node) for node in self._attentions}
        self._graph.nodes[:] = [node for node in self._graph.nodes if id(node) not in old] + op.nodes + attentions
        self._graph.inputs += [past for cache in caches for past in cache[:2]]
        self._graph.outputs += [present for cache in caches for present in cache[2:]]
        outputs = graph_output_ids(self._model)
        dead = {id(node) for node in remove_dead(list(self._graph.nodes), outputs)}
        self._graph.nodes[:] = [node for node in self._graph.nodes if id(node) not in dead]
        sort_nodes(self._graph)
        drop_unused_functions(self._model)
        if self._mask is not None:
            self._mask.shape = [self._mask.shape[0], f"{_PAST} + {self._length}"]

    def _reads_mask(self, node: gs.Node) -> Iterator[int]:
        return (index for index, tensor in enumerate(node.inputs) if tensor is self._mask)

    def _reads(self, place: tuple[gs.Node, int]) -> bool:
        return bool(place[0].inputs[place[1]] is self._mask)

    def _cut_mask(self, op: Builder, lengths: Lengths, places: list[tuple[gs.Node, int]]) -> None:
        """Let what is left of the model as it was, sizes for the most part, see the mask of the new tokens only."""
        sizes = [(node, index) for node, index in places if node.op == "Shape"]
        for node, index in sizes:
            node.inputs[index] = self._ids  # of the same shape
        rest = [(node, index) for node, index in places if node.op != "Shape"]
        if rest:
            cut = op.Slice(self._mask, lengths.before, [2**63 - 1], [1])
            cut.dtype, cut.shape = self._mask.dtype, list(self._mask.shape)  # type: ignore[union-attr]
            for node, index in rest:
                node.inputs[index] = cut

    def _cache(self, layer: int, node: gs.Node) -> tuple[gs.Variable, gs.Variable, gs.Variable, gs.Variable]:
        """Return past key and value, present key and value."""
        made = []
        heads = int(node.attrs["kv_num_heads"])
        batch, length = self._ids.shape[0], str(self._length)
        for kind in ("past_key_values", "present"):
            for part, tensor in (("key", node.inputs[1]), ("value", node.inputs[2])):
                shape = self._values.shape_of(tensor)
                width = shape[-1] if shape else None
                if not isinstance(width, int):
                    raise MixesTokensError(f"the size of '{tensor.name}' is not known", node)
                size = width if attention_form(node).heads_major else width // heads
                name = f"{kind}.{layer}.{part}"
                if self._model.fresh_name(name) != name:
                    raise MixesTokensError(f"the model has a tensor called '{name}' already", node)
                sequence = _PAST if kind != "present" else f"{_PAST} + {length}"
                made.append(gs.Variable(name, tensor.dtype, [batch, heads, sequence, size]))
        return made[0], made[1], made[2], made[3]

    def _replacements(self, text: WholeText) -> Iterator[tuple[gs.Node, int, gs.Tensor]]:
        growing = GrowingText(self._values, self._length, self._mask)
        for node in list(self._graph.nodes):
            for index, tensor in enumerate(node.inputs):
                if self._axes.of(node.outputs[0]) is None or self._axes.of(tensor) is not None:
                    continue
                if text.is_static(tensor) or index in _SIZE_SLOTS.get(node.op, ()):
                    continue
                growing.check(tensor)
                new = self._replacement(text, node, index, tensor)
                if new is not None:
                    yield node, index, new

    def _replacement(self, text: WholeText, node: gs.Node, index: int, tensor: gs.Tensor) -> gs.Tensor | None:
        shape = self._values.shape_of(tensor)
        if shape is None:
            raise MixesTokensError(f"the shape of '{tensor.name}' is not known", node)
        runs = [axis for axis, dim in enumerate(shape) if dim == self._length]
        if any(depends_on(dim, self._length) and dim != self._length for dim in shape):
            raise MixesTokensError(f"'{tensor.name}' is [{', '.join(map(str, shape))}]", node)
        if is_attention(node):  # the bias: keys along the last axis, queries along the one before
            rank = len(shape)
            if any(axis < rank - 2 for axis in runs):
                raise MixesTokensError(f"the mask is [{', '.join(map(str, shape))}]", node)
            return text.new(tensor, rank - 2) if rank - 2 in runs else text.whole(tensor)
        if not runs:
            if self._is_size(tensor):
                raise MixesTokensError(f"'{tensor.name}' depends on the number of tokens", node)
            return None
        axis = self._axes.of(node.outputs[0])
        assert axis is not None
        rotary = index in (1, 2) and node.op in {concept.name for concept in ROTARY.values()}
        elementwise = normal_domain(node.domain) == "" and node.op in ELEMENTWISE
        along = 1 if rotary else len(shape) - axis.from_right if elementwise and not axis.flat else None
        if runs != [along]:
            raise MixesTokensError(f"'{tensor.name}' holds something for each token in a way that is not known", node)
        return text.new(tensor, runs[0])

    def _is_size(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor without an axis of tokens may still depend on their number, or on the mask."""
        value = self._values.value_of(tensor)
        if value is None:
            return True
        return any(item is None or depends_on(item, self._length) for item in value.reshape(-1))

    def _with_cache(self, node: gs.Node, *cache: gs.Variable) -> gs.Node:
        form: AttentionForm = replace(attention_form(node), past=True, present=True)
        inputs = [*node.inputs[:3], *cache[:2], *node.inputs[3:]]
        outputs, attributes = [*node.outputs, *cache[2:]], dict(node.attrs)
        name = node.name
        detach(node)
        options: dict[str, Any] = {key: attributes[key] for key in ("q_num_heads", "kv_num_heads", "scale")}
        return call_attention(
            self._model,
            name,
            form,
            inputs,
            outputs,
            softcap=attributes["softcap"],
            window=attributes["window"],
            **options,
        )
