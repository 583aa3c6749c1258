"""Leave out the heads of attentions that matter least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.concepts.attention import attention_form, is_attention
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.ir.topology import sort_nodes
from onnxslim_llm.passes.prune.heads.cut_heads import cut_heads
from onnxslim_llm.passes.prune.heads.head_scores import Ranking, leave_out, rank_groups
from onnxslim_llm.passes.prune.rows.refitted_rows import RefittedRows
from onnxslim_llm.products.heads import HeadLayer, find_head_layers
from onnxslim_llm.products.selection import compile_patterns
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Change
from onnxslim_llm.stats.statistics import StoredMoments

__all__ = ["PruneHeads"]


@dataclass(frozen=True)
class PruneHeads(RefittedRows):
    """Leave out heads of attentions, and fit the rows that are left behind them to what all heads computed.

    A key head goes together with all query heads that read it, and with its place in the KV cache: files, caches,
    memory and time shrink in every runtime. Queries, keys and values that one product makes are made by three
    afterwards; `pack_projections` joins them again.

    Before:
        Y, PK, PV = Attention <q_num_heads = 8, kv_num_heads = 4> (Q, K, V, past_key[B, 4, P, D], past_value)
        Z = MatMul (Y, O[8 * D, N])
    After:
        Y, PK, PV = Attention <q_num_heads = 6, kv_num_heads = 3> (Q, K, V, past_key[B, 3, P, D], past_value)
        Z = MatMul (Y, O[6 * D, N])

    Skips when:
        - the attention is not fused, is an operator of a runtime already, or has the heads before the tokens;
        - between the products and the attention something mixes heads, or reads or returns what it would get;
        - one of the weights has several uses, is quantized already, sparse, or may be replaced by the caller;
        - the cache is computed or read elsewhere in the model;
        - fewer than one key head could go, or a name matches `exclude`;
        - `uniform` is on, and another attention with a cache has to keep its heads.

    Attributes:
        share: Share of the key heads that go, at least 0 and below 1; rounded to whole heads, of which one stays.
        keep: Instead: the number of query heads that stay in each attention. It must leave whole groups, those of one
            key head.
        uniform: The same number in every attention, which onnxruntime-genai and most configurations need. If not, the
            heads that cost least in the whole model go.
        refit: With data, fit the rows that are left by least squares, where that helps on held-out samples.
        exclude: Regular expressions; attentions that have a match in their name, or in that of the weight behind, stay.
    """

    name: ClassVar[str] = "prune_heads"

    keep: int = 0
    uniform: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep < 0:
            raise UsageError(
                f"keep = {self.keep} is not possible", where=self.name, todo="choose 0 (use share) or more"
            )
        if self.keep and not self.uniform:
            what = "keep says how many heads stay in each attention, and uniform=false that this may differ"
            raise UsageError(what, where=self.name, todo="use share with uniform=false")

    def apply(self, model: Model, context: Context) -> Change:
        """Choose the heads; the weights are cut and fitted at save.

        Raises:
            UsageError: `keep` would break groups of query heads.
        """
        change = Change()
        infer_shapes(model)
        layers = self._chosen(find_head_layers(model, change), change)
        layers = self._all_or_none(model, layers, change)
        moments = [self._moments(context, layer, change) for layer in layers]
        rankings = [rank_groups(layer, found, fitted=self.refit) for layer, found in zip(layers, moments, strict=True)]
        entries: list[dict[str, Any]] = []
        for layer, found, groups in zip(layers, moments, self._kept(layers, rankings), strict=True):
            if len(groups) == layer.groups:
                change.skip(layer.name, "heads of other attentions cost less")
                continue
            before = [layer.groups * layer.group_size, layer.groups]
            cut_heads(model, context, layer, groups, found if self.refit else None)
            change.sites.append(layer.name)
            after = [len(groups) * layer.group_size, len(groups)]
            entries.append({"name": layer.name, "heads": [before, after], "kept": groups.tolist()})
        if entries:
            change.detail.update(layers=entries, config=_config(model, layers))
            if not change.detail["config"]:
                context.notes.append("attentions have different numbers of heads now, which no config.json can say")
            sort_nodes(model.graph)
            infer_shapes(model)
        return change

    def _chosen(self, layers: Sequence[HeadLayer], change: Change) -> list[HeadLayer]:
        """Return the attentions of which heads may and can go."""
        exclude = compile_patterns(self.exclude, self.name)
        found = []
        for layer in layers:
            names = (layer.name, layer.product.name)
            pattern = next((p.pattern for p in exclude if any(p.search(name) for name in names)), None)
            if pattern is not None:
                change.skip(layer.name, f"it is excluded by '{pattern}'")
            elif self._left(layer) == layer.groups and self.uniform:
                wanted = f"{self.keep} query heads" if self.keep else f"{1 - self.share:.0%} of them"
                change.skip(layer.name, f"of {layer.groups} key heads none can go where {wanted} stay")
            else:
                found.append(layer)
        return found

    def _left(self, layer: HeadLayer) -> int:
        if self.keep:
            if self.keep % layer.group_size:
                lower = self.keep // layer.group_size * layer.group_size
                near = [n for n in (lower, lower + layer.group_size) if n]
                raise UsageError(
                    f"{self.keep} query heads cannot stay: each key head has {layer.group_size} of them",
                    where=layer.name,
                    todo=f"choose keep={' or '.join(map(str, near))}",
                )
            return min(self.keep // layer.group_size, layer.groups)
        return max(1, round(layer.groups * (1 - self.share)))

    def _all_or_none(self, model: Model, layers: list[HeadLayer], change: Change) -> list[HeadLayer]:
        """Return the attentions without those with caches, if not all caches can shrink alike."""
        if not self.uniform:
            return layers
        ours = {id(layer.node) for layer in layers}
        stays = next((n for n in model.graph.nodes if _has_cache(n) and id(n) not in ours), None)
        counts = {self._left(layer) for layer in layers if layer.caches}
        if stays is None and len(counts) < 2:
            return layers
        other = f"'{stays.name or stays.outputs[0].name}' keeps its heads" if stays else "they have different numbers"
        for layer in layers:
            if layer.caches:
                change.skip(layer.name, f"{other}, and all attentions need the same number; see uniform")
        return [layer for layer in layers if not layer.caches]

    def _moments(self, context: Context, layer: HeadLayer, change: Change) -> StoredMoments | None:
        product = layer.product
        moments = context.statistics.of_weight(product.name) if context.statistics is not None else None
        if moments is not None and moments.size == product.rows:
            return moments
        if self.refit:
            change.skip(product.name, "no calibration data reach it: its heads are chosen by magnitude")
        return None

    def _kept(self, layers: Sequence[HeadLayer], rankings: Sequence[Ranking]) -> list[NDArray[np.int64]]:
        if self.uniform:
            left = [self._left(layer) for layer in layers]
        else:
            count = round(self.share * sum(layer.groups for layer in layers))
            gone = leave_out(rankings, count)
            left = [layer.groups - n for layer, n in zip(layers, gone, strict=True)]
        return [ranking.kept(n) for ranking, n in zip(rankings, left, strict=True)]


def _has_cache(node: Any) -> bool:
    return is_attention(node) and (attention_form(node).past or attention_form(node).present)


def _config(model: Model, layers: Sequence[HeadLayer]) -> dict[str, int]:
    """Return what a configuration must say about the heads from now on; nothing if attentions differ."""
    nodes = [node for node in model.graph.nodes if is_attention(node)]
    counts = {(int(node.attrs["q_num_heads"]), int(node.attrs["kv_num_heads"])) for node in nodes}
    widths = {layer.values.path.width for layer in layers}
    if len(counts) != 1 or len(widths) != 1:
        return {}
    ((queries, keys),) = counts
    return {"num_attention_heads": queries, "num_key_value_heads": keys, "head_dim": widths.pop()}
