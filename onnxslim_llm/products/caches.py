"""The KV cache of an attention as the model's own inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.attention import attention_form
from onnxslim_llm.rewrite.constants import constant_value
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["Cache", "caches_of"]

_FIRST_CACHE = 3  # among the inputs of an attention, behind queries, keys and values
_HEAD_AXIS = 1
_CARRIERS = frozenset({"Cast", "Identity"})


@dataclass
class Cache:
    """Keys or values [B, H, P, D] of one attention.

    Attributes:
        past: The model's input; None if the model only gives a cache.
        present: The model's output; None if it only takes one.
        tensors: All activations that are the cache, the two among them.
    """

    past: gs.Variable | None = None
    present: gs.Variable | None = None
    tensors: list[gs.Variable] = field(default_factory=list)


def caches_of(model: Model, attention: gs.Node) -> list[Cache] | str:
    """Return the caches of an attention's keys and values, none if it has none, or why they cannot be changed.

    Args:
        model: The model.
        attention: A concept.
    """
    form, heads = attention_form(attention), int(attention.attrs["kv_num_heads"])
    found: list[Cache] = []
    for offset in (0, 1):
        past = attention.inputs[_FIRST_CACHE + offset] if form.past else None
        present = attention.outputs[1 + offset] if form.present else None
        cache = _find_cache(model, attention, past, present, heads)
        if isinstance(cache, str):
            return cache
        found += [] if cache is None else [cache]
    return found


def _find_cache(
    model: Model, attention: gs.Node, past: gs.Tensor | None, present: gs.Variable | None, heads: int
) -> Cache | str | None:
    """Return the cache behind an attention's operands, None if it has none, or why it cannot be changed."""
    cache = Cache()
    inputs, outputs = {id(t) for t in model.graph.inputs}, {id(t) for t in model.graph.outputs}
    tensor, reader = past, attention
    while tensor is not None:
        if not isinstance(tensor, gs.Variable) or (reason := _other_reader(tensor, reader)):
            return reason if isinstance(tensor, gs.Variable) else "its cache is a constant"
        cache.tensors.append(tensor)
        if id(tensor) in inputs:
            cache.past = tensor
            break
        if not tensor.inputs or tensor.inputs[0].op not in _CARRIERS:
            return f"its cache '{tensor.name}' is computed in the model"
        reader = tensor.inputs[0]
        tensor = reader.inputs[0]
    tensor = present
    while isinstance(tensor, gs.Variable) and not tensor.is_empty():
        cache.tensors.append(tensor)
        onwards = [node for node in tensor.outputs if not _watches_other_axes(node)]
        if id(tensor) in outputs:
            cache.present = tensor
        if not onwards:
            break
        if len(onwards) > 1 or onwards[0].op not in _CARRIERS or id(tensor) in outputs:
            return f"{onwards[0].op} '{onwards[0].name}' reads its cache '{tensor.name}'"
        tensor = onwards[0].outputs[0]
    for tensor in cache.tensors:
        if tensor.shape is None or len(tensor.shape) != 4 or tensor.shape[_HEAD_AXIS] != heads:
            return f"its cache '{tensor.name}' does not say that it has {heads} heads"
    return cache if cache.tensors else None


def _other_reader(tensor: gs.Variable, reader: gs.Node) -> str:
    for node in tensor.outputs:
        if node is not reader and not _watches_other_axes(node):
            return f"{node.op} '{node.name or node.outputs[0].name}' reads its cache '{tensor.name}', too"
    return ""


def _watches_other_axes(node: gs.Node) -> bool:
    """Return whether a node asks for the batch or the tokens of a cache only."""
    if node.op != "Shape" or normal_domain(node.domain) != "":
        return False
    start, end = int(node.attrs.get("start", 0)) % 4, int(node.attrs.get("end", 4))
    if start > _HEAD_AXIS or end == 1:
        return True
    for reader in node.outputs[0].outputs:
        index = constant_value(reader.inputs[1]) if reader.op == "Gather" else None
        if index is None or np.any((start + index) % 4 == _HEAD_AXIS):
            return False
    return True
