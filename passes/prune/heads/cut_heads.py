"""Taking heads out of an attention: weights, vectors, masks, caches, and every number that says how many there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.ir.weights import ViewWeight, constant, weight_of
from onnxslim_llm.ir.weights.jobs import derive
from onnxslim_llm.passes.prune.rows.refit_rows_job import RefitRowsJob
from onnxslim_llm.passes.prune.rows.select_job import selected
from onnxslim_llm.products.head_operands import HeadOperand
from onnxslim_llm.products.heads import HeadLayer
from onnxslim_llm.products.owned_weights import Constants
from onnxslim_llm.rewrite.constants import constant_value
from onnxslim_llm.rewrite.edit import Builder, inherit_metadata, redirect, remove_dead
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.stats.transforms import Kept

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context
    from onnxslim_llm.stats.statistics import StoredMoments

__all__ = ["cut_heads"]

Indices = NDArray[np.int64]
_HEAD_AXIS = 1  # of caches and masks


def cut_heads(model: Model, context: Context, layer: HeadLayer, groups: Indices, moments: StoredMoments | None) -> None:
    """Leave only some key heads, with their query heads, in an attention.

    The nodes of the graph are not sorted afterwards, and shapes are to be inferred again.

    Args:
        model: The model.
        context: Its statistics and ranges of caches are changed to what they will be.
        layer: The attention.
        groups: The key heads that stay, ascending.
        moments: Of the summing product's input: its rows are fitted to what all heads computed. None: they are kept.
    """
    constants = Constants(model)
    dead: list[gs.Node] = []
    heads = layer.heads(groups)
    for operand, kept, role in (
        (layer.queries, heads, "query"),
        (layer.keys, groups, "key"),
        (layer.values, groups, "value"),
    ):
        _cut_operand(model, context, constants, operand, kept, role)
        dead += operand.moves
    _drop(model, dead)
    _cut_sum(model, context, layer, groups, moments)
    layer.node.attrs.update(q_num_heads=len(heads), kv_num_heads=len(groups))
    if layer.mask is not None:
        _cut_mask(model, layer, layer.mask, heads)
    for cache in layer.caches:
        for tensor in cache.tensors:
            shape = list(tensor.shape)
            shape[_HEAD_AXIS] = len(groups)
            tensor.shape = shape
        if cache.present is not None and context.cache_ranges and cache.present.name in context.cache_ranges:
            ranges = context.cache_ranges[cache.present.name][groups]
            context.cache_ranges = {**context.cache_ranges, cache.present.name: ranges}


def _cut_operand(
    model: Model, context: Context, constants: Constants, operand: HeadOperand, heads: Indices, role: str
) -> None:
    path = operand.path
    channels = (heads[:, None] * path.width + np.arange(path.width)).reshape(-1)
    if operand.moves:
        _make_alone(model, context, operand, operand.columns[channels], role)
    else:
        product = operand.product
        product.constant.values = selected(product.weight, 1 - product.k_axis, channels, product.name)
        for node, index in operand.biases:
            _cut_vector(constants, node, index, channels)
    for node, index in path.vectors:
        _cut_vector(constants, node, index, channels)
    for node in path.rotaries:
        node.attrs["num_heads"] = len(heads)
    for node in path.reshapes:
        _set_shape(model, node, {path.heads: len(heads), path.size: len(channels)}, from_axis=2)
    for tensor in path.tensors:
        tensor.shape = None


def _cut_vector(constants: Constants, node: gs.Node, index: int, channels: Indices) -> None:
    tensor = node.inputs[index]
    weight = weight_of(tensor)
    constants.put(node, index, selected(weight, len(weight.shape) - 1, channels, tensor.name))


def _make_alone(model: Model, context: Context, operand: HeadOperand, columns: Indices, role: str) -> None:
    """Make an operand by a product of its own, instead of taking it out of the result of a larger one."""
    product, made = operand.product, operand.made
    name = model.fresh_name(f"{product.name}_{role}")
    weight = selected(product.weight, 1 - product.k_axis, columns, name)
    op = Builder(model, made.name)
    result = op.MatMul(operand.left, constant(name, weight if product.k_axis == 0 else ViewWeight.transpose(weight)))
    for node, index in reversed(operand.biases):
        bias = node.inputs[index]
        source = weight_of(bias)
        fresh = model.fresh_name(f"{bias.name}_{role}")
        result = op.Add(result, constant(fresh, selected(source, len(source.shape) - 1, columns, fresh)))
    inherit_metadata(product.node, result)
    result.dtype = made.dtype
    redirect(made, result)
    model.graph.nodes.extend(op.nodes)
    if context.statistics is not None:
        context.statistics = context.statistics.changed(name, origin=product.name)


def _drop(model: Model, nodes: list[gs.Node]) -> None:
    gone = {id(node) for node in remove_dead(nodes, graph_output_ids(model))}
    if gone:
        model.graph.nodes[:] = [node for node in model.graph.nodes if id(node) not in gone]


def _cut_sum(model: Model, context: Context, layer: HeadLayer, groups: Indices, moments: StoredMoments | None) -> None:
    product, rows = layer.product, layer.rows(groups)
    if layer.flatten is not None:
        _set_shape(model, layer.flatten, {product.rows: len(rows)}, from_axis=1)
        layer.flatten.outputs[0].shape = None
    if moments is not None:
        (fitted,) = derive(RefitRowsJob(product.weight, product.k_axis, rows, moments, product.name))
        product.constant.values = fitted
    else:
        product.constant.values = selected(product.weight, product.k_axis, rows, product.name)
    layer.node.outputs[0].shape = None
    if context.statistics is not None:
        context.statistics = context.statistics.changed(product.name, Kept(rows))


def _cut_mask(model: Model, layer: HeadLayer, index: int, heads: Indices) -> None:
    mask = layer.node.inputs[index]
    op = Builder(model, mask.name)
    part = op.Gather(mask, heads, axis=len(mask.shape) - 3)
    part.dtype = mask.dtype
    layer.node.inputs[index] = part
    model.graph.nodes.extend(op.nodes)


def _set_shape(model: Model, node: gs.Node, sizes: dict[int, int], *, from_axis: int) -> None:
    """Change some sizes in the constant shape of a Reshape."""
    shape = constant_value(node.inputs[1])
    assert shape is not None, node.name
    changed = [sizes.get(int(n), int(n)) if axis >= from_axis else int(n) for axis, n in enumerate(shape)]
    node.inputs[1] = constant(model.fresh_name(f"{node.name or node.op}/shape"), np.array(changed, np.int64))
