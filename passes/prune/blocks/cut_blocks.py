"""Taking blocks out of a model: the residual stream goes past them, and the caches that are left are numbered again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnxslim_llm.concepts.attention import is_attention
from onnxslim_llm.errors import ModelError
from onnxslim_llm.products.blocks import ResidualBlock
from onnxslim_llm.products.caches import Cache, caches_of
from onnxslim_llm.rewrite.edit import redirect, remove_dead
from onnxslim_llm.rewrite.engine import graph_output_ids

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["cut_blocks"]


def cut_blocks(model: Model, context: Context, gaps: Sequence[Sequence[ResidualBlock]]) -> None:
    """Take blocks out.

    Args:
        model: The model.
        context: Its ranges of caches are named as the caches are named afterwards.
        gaps: Runs of blocks that follow each other.

    Raises:
        ModelError: The caches of the blocks that stay are not known.
    """
    gone = [block for gap in gaps for block in gap]
    all_caches = _caches(model) if any(block.caches for block in gone) else []
    names = [(c.past.name if c.past else "", c.present.name if c.present else "") for c in all_caches]
    lost = {id(cache.past or cache.present) for block in gone for cache in block.caches}
    left = [cache for cache in all_caches if id(cache.past or cache.present) not in lost]
    removed = [cache for cache in all_caches if id(cache.past or cache.present) in lost]
    _watch_others(removed, left)
    for tensor in (cache.present for cache in removed if cache.present is not None):
        model.graph.outputs[:] = [other for other in model.graph.outputs if other is not tensor]
    for gap in gaps:
        redirect(gap[-1].after, gap[0].before)
    dead = [node for block in gone for node in block.nodes]
    ends = [block.after.inputs[0] for gap in gaps for block in gap]
    gone_nodes = {id(node) for node in remove_dead([*ends, *reversed(dead)], graph_output_ids(model))}
    model.graph.nodes[:] = [node for node in model.graph.nodes if id(node) not in gone_nodes]
    for tensor in (cache.past for cache in removed if cache.past is not None):
        model.graph.inputs[:] = [other for other in model.graph.inputs if other is not tensor]
    _number_again(context, left, names)


def _caches(model: Model) -> list[Cache]:
    """Return the caches of all attentions, keys and values in turn.

    Raises:
        ModelError: One of them is not the model's input and output.
    """
    found: list[Cache] = []
    for node in filter(is_attention, model.graph.nodes):
        caches = caches_of(model, node)
        if isinstance(caches, str):
            todo = "leave the pass remove_blocks out"
            raise ModelError(f"caches cannot be numbered again: {caches}", where=node.name, todo=todo)
        found += caches
    return found


def _watch_others(removed: Sequence[Cache], left: Sequence[Cache]) -> None:
    """Let what asks for the length of a cache that goes ask one that stays."""
    stays = next((cache.past for cache in left if cache.past is not None), None)
    for cache in removed:
        if cache.past is None or stays is None:
            continue
        for node in [n for n in cache.past.outputs if n.op == "Shape"]:
            index = next(i for i, tensor in enumerate(node.inputs) if tensor is cache.past)
            node.inputs[index] = stays


def _number_again(context: Context, left: Sequence[Cache], names: Sequence[tuple[str, str]]) -> None:
    """Give the caches that are left the names of the first ones, in order."""
    ranges = dict(context.cache_ranges or {})
    renamed = {}
    for cache, (past, present) in zip(left, names, strict=False):
        if cache.present is not None and cache.present.name in ranges:
            renamed[present] = ranges[cache.present.name]
        if cache.past is not None:
            cache.past.name = past
        if cache.present is not None:
            cache.present.name = present
    if context.cache_ranges is not None:
        context.cache_ranges = renamed
