"""One attention as it is spelled in the graph, and how it is to be written."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.ir.shapes import SymbolicValues
from onnxslim_llm.ir.topology import read_tensors
from onnxslim_llm.passes.fuse.attention.arrange import Arrangement
from onnxslim_llm.passes.fuse.attention.axes import View, leaves, regroup, size_of
from onnxslim_llm.passes.fuse.attention.bias import lift_masks
from onnxslim_llm.passes.fuse.attention.operands import Cache, Heads, Operand, new_operand, read_heads
from onnxslim_llm.passes.fuse.attention.outputs import Result, Results, read_results
from onnxslim_llm.passes.fuse.attention.products import NotAttentionError
from onnxslim_llm.passes.fuse.attention.scores import Scores, is_widening, keeps_rows, producer, read_scores
from onnxslim_llm.passes.fuse.attention.weights import Weights, read_weights

__all__ = ["Site", "Surroundings", "read_site"]


@dataclass(frozen=True)
class Surroundings:
    """What is known about the graph of an attention.

    Attributes:
        values: Shapes and small contents.
        outputs: `id`s of all tensors that are outputs of a graph.
        positions: Place in the topological order by `id` of a node, as it was at the start.
        opset: Version of ai.onnx.
    """

    values: SymbolicValues
    outputs: Collection[int]
    positions: Mapping[int, int]
    opset: int


@dataclass(frozen=True)
class Site:
    """An attention.

    Attributes:
        scores, weights: What is before and after the Softmax.
        heads: The operands.
        kv_number: Key and value heads.
        heads_major: The layout that is cheapest.
        q, k, v: The operands in that layout; with caches, `k` and `v` are what is appended.
        caches: Key cache and value cache, or None.
        result: The tensor that is taken over.
        shape: Of what the attention puts out.
        lifted: How the operand of each mask is brought to four axes.
        float_softmax: The Softmax computes in float32 between 16-bit floats.
        dtype: Element type of the operands.
        nodes: All nodes that the fused one stands for.
    """

    scores: Scores
    weights: Weights
    heads: Heads
    kv_number: int
    heads_major: bool
    q: Operand
    k: Operand
    v: Operand
    caches: tuple[Cache, Cache] | None
    result: Result
    shape: list[int | str | None]
    lifted: list[Arrangement]
    float_softmax: bool
    dtype: np.dtype[Any]
    nodes: list[gs.Node]

    @property
    def scale(self) -> float:
        """Factor of the products of what is read."""
        keys = self.heads.k.trail.factors[0] if self.caches else self.k.factor
        return self.scores.factor * self.q.factor * keys


def read_site(softmax: gs.Node, around: Surroundings) -> Site:
    """Return the attention that `softmax` belongs to.

    Raises:
        NotAttentionError: It belongs to none that can be written as one node; the reason is given.
    """
    values = around.values
    _check_axis(softmax, around)
    cast = producer(softmax.inputs[0])
    widened = cast if cast is not None and is_widening(cast) else None
    scores = read_scores(widened.inputs[0] if widened else softmax.inputs[0], values)
    if not keeps_rows(scores.product_view, scores.view):
        scores = _turned(scores, softmax)
    weights = read_weights(softmax, scores, values, around.outputs)
    if not keeps_rows(scores.product_view, weights.view):
        raise NotAttentionError("the weights are transposed before they meet the values", weights.product.node)
    narrowed = weights.narrowed
    if (widened is None) != (narrowed is None) or (
        widened and narrowed and widened.inputs[0].dtype != narrowed.outputs[0].dtype
    ):
        raise NotAttentionError("products and Softmax have different types", softmax)
    nodes = [*scores.nodes, *([widened] if widened else []), softmax, *weights.nodes]
    _check_private(nodes, around)
    heads = read_heads(scores.product, weights.product, weights.view, values)
    dtype = scores.product.left.dtype
    if dtype is None:
        raise NotAttentionError("the type of the queries is not known", scores.product.left)
    masks = [mask.operand for mask in scores.masks if mask.operand is not None]
    inner = {id(tensor) for node in nodes for tensor in node.outputs}
    if any(id(mask) in inner for mask in masks):
        raise NotAttentionError("the scores are masked with themselves", softmax)
    lifted = lift_masks(scores.masks, _four_axes(scores.view, heads), values)
    results = read_results(weights.product, heads.number, values, around.outputs)
    kv_number, caches = _caches(heads, masks, around)
    major, q, k, v, result = _layout(heads, kv_number, caches, results, values, softmax)
    site = Site(
        scores,
        weights,
        heads,
        kv_number,
        major,
        q,
        k,
        v,
        caches,
        result,
        results.shape(major),
        lifted,
        widened is not None,
        np.dtype(dtype),
        nodes,
    )
    _check_digits(site, softmax)
    return site


def _check_digits(site: Site, softmax: gs.Node) -> None:
    """Attributes are float32: what scales double precision must be a number of that type."""
    numbers = (site.scale, site.scores.softcap)
    if site.dtype == np.float64 and any(float(np.float32(number)) != number for number in numbers):
        raise NotAttentionError("the scale of double precision has more digits than an attribute", softmax)


def _check_axis(softmax: gs.Node, around: Surroundings) -> None:
    shape = around.values.shape_of(softmax.inputs[0])
    axis = int(softmax.attrs.get("axis", -1 if around.opset >= 13 else 1))
    if axis != -1 and (shape is None or axis != len(shape) - 1):
        raise NotAttentionError("the Softmax runs over another axis than the last", softmax)


def _turned(scores: Scores, softmax: gs.Node) -> Scores:
    product = scores.product.exchanged()
    view: View = [*scores.product_view[:-2], scores.product_view[-1], scores.product_view[-2]]
    if not keeps_rows(view, scores.view):
        raise NotAttentionError("the scores are transposed on the way to the Softmax", softmax)
    scores.product, scores.product_view = product, view
    return scores


def _check_private(nodes: list[gs.Node], around: Surroundings) -> None:
    inside = {id(node) for node in nodes}
    if any(key not in around.positions for key in inside):
        raise NotAttentionError("parts of it are in another graph", nodes[-1])
    for node in nodes[:-1]:
        for tensor in node.outputs:
            if id(tensor) in around.outputs:
                raise NotAttentionError("an inner tensor is an output of the graph", tensor)
            if any(id(user) not in inside for user in tensor.outputs):
                raise NotAttentionError("an inner tensor is used elsewhere", tensor)


def _four_axes(view: View, heads: Heads) -> View:
    """Return [B, H, S, T] in the atoms of the scores."""
    atoms = [atom for axis in view[:-2] for atom in leaves(axis)]
    count = len(leaves(view[0]))
    parts: View | None = [atoms[:count], atoms[count:]]
    if len(view) == 3:
        parts = regroup(atoms, (size_of(heads.q.axes.batch), heads.number))
    if parts is None or size_of(parts[1]) != heads.number:
        raise NotAttentionError("batch and heads of the scores cannot be told apart", heads.q.trail.tensors[-1])
    return [*parts, view[-2], view[-1]]


def _caches(heads: Heads, masks: Iterable[gs.Tensor], around: Surroundings) -> tuple[int, tuple[Cache, Cache] | None]:
    """Return the number of key and value heads, and the caches if they can become part of the attention."""
    for number in heads.kv_numbers:
        keys, values = heads.k.cache(number, around.values), heads.v.cache(number, around.values)
        if keys is None or values is None or keys.node is values.node:
            continue
        nodes = [keys.node, values.node]
        if any(id(node.outputs[0]) not in around.outputs or id(node) not in around.positions for node in nodes):
            continue
        reads = [heads.q.trail.tensors[0], keys.past, keys.new, values.past, values.new, *masks]
        if not _depend(reads, nodes, around):
            return number, (keys, values)
    return heads.kv_numbers[0], None


def _depend(tensors: Iterable[gs.Tensor], nodes: list[gs.Node], around: Surroundings) -> bool:
    """Return whether one of `tensors` is computed from the result of one of `nodes`."""
    wanted = {id(node) for node in nodes}
    first = min(around.positions[id(node)] for node in nodes)
    stack = [node for tensor in tensors for node in tensor.inputs]
    seen: set[int] = set()
    while stack:
        node = stack.pop()
        if id(node) in wanted:
            return True
        if id(node) in seen or around.positions.get(id(node), first) < first:
            continue
        seen.add(id(node))
        stack += [before for tensor in read_tensors(node) for before in tensor.inputs]
    return False


def _layout(
    heads: Heads,
    number: int,
    caches: tuple[Cache, Cache] | None,
    results: Results,
    values: SymbolicValues,
    softmax: gs.Node,
) -> tuple[bool, Operand, Operand, Operand, Result]:
    best: tuple[int, bool, Operand, Operand, Operand, Result] | None = None
    for major in (True, False):  # by head where both cost the same: then queries and keys are by head already
        q = heads.q.best(heads.number, major)
        k = new_operand(caches[0], values, major) if caches else heads.k.best(number, major)
        v = new_operand(caches[1], values, major) if caches else heads.v.best(number, major)
        result = results.best(major)
        if q is None or k is None or v is None or result is None:
            continue
        cost = q.cost + k.cost + v.cost + result.cost
        if best is None or cost < best[0]:
            best = (cost, major, q, k, v, result)
    if best is None:
        raise NotAttentionError("its operands have a layout that no attention reads", softmax)
    return best[1:]
