"""How exporters keep queries that see no key from becoming NaN: their weights are replaced by 0."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.passes.fuse.attention_scores import producer
from onnxslim_llm.rewrite.constants import constant_value

__all__ = ["guard_against_empty_rows", "guard_against_nan"]

#: Quantifier over the keys (None: there is one answer for each key), and whether it asks for hidden ones.
_Claim = tuple[str | None, bool]
_DUAL = {"all": "any", "any": "all", None: None}
_QUANTIFIERS = {"ReduceMin": "all", "ReduceMax": "any"}


def guard_against_nan(weights: gs.Tensor, users: list[gs.Node]) -> gs.Node | None:
    """Return the Where of Where(IsNaN(weights), 0, weights) if nothing else reads the weights."""
    if sorted(user.op for user in users) != ["IsNaN", "Where"]:
        return None
    isnan, where = sorted(users, key=lambda user: str(user.op))
    alone = len(isnan.outputs[0].outputs) == 1
    if not alone or where.inputs[0] is not isnan.outputs[0] or where.inputs[2] is not weights:
        return None
    return where if _is_zero(where.inputs[1]) else None


def guard_against_empty_rows(where: gs.Node, weights: gs.Tensor, scores: gs.Tensor) -> list[gs.Node] | None:
    """Return the nodes of Where(all scores of the row are -inf, 0, weights), or None if `where` is something else."""
    if where.op != "Where" or where.inputs[2] is not weights or not _is_zero(where.inputs[1]):
        return None
    nodes: list[gs.Node] = []
    if _claim(where.inputs[0], scores, nodes) != ("all", True):
        return None
    return [*nodes, where]


def _is_zero(tensor: gs.Tensor) -> bool:
    value = constant_value(tensor)
    if value is not None:
        return not value.any()
    node = producer(tensor)
    if node is None:
        return False
    if node.op == "Expand":
        return _is_zero(node.inputs[0])
    fill = node.attrs.get("value")
    return node.op == "ConstantOfShape" and (fill is None or _is_zero(fill))


def _claim(tensor: gs.Tensor, scores: gs.Tensor, nodes: list[gs.Node]) -> _Claim | None:
    """Return what a tensor of booleans (or 0 and 1) says about the rows of `scores`; collect the nodes that make it."""
    node = producer(tensor)
    if node is None:
        return None
    if node.op in ("Equal", "IsInf") and any(operand is scores for operand in node.inputs):
        nodes.append(node)
        return (None, True) if _asks_for_minus_inf(node, scores) else None
    claim = _claim(node.inputs[0], scores, nodes) if node.op in ("Cast", "Not", *_QUANTIFIERS) else None
    if claim is None:
        return None
    nodes.append(node)
    quantifier, hidden = claim
    if node.op == "Not":  # no key is seen: all are hidden
        return _DUAL[quantifier], not hidden
    if node.op == "Cast":
        return claim
    return (_QUANTIFIERS[node.op], hidden) if quantifier is None and _runs_over_keys(node) else None


def _asks_for_minus_inf(node: gs.Node, scores: gs.Tensor) -> bool:
    if node.op == "IsInf":
        return int(node.attrs.get("detect_negative", 1)) == 1 and int(node.attrs.get("detect_positive", 1)) == 0
    values = [constant_value(operand, limit=1) for operand in node.inputs if operand is not scores]
    return len(values) == 1 and values[0] is not None and bool(np.all(values[0] == -np.inf))


def _runs_over_keys(node: gs.Node) -> bool:
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1:
        axes = constant_value(node.inputs[1])
    rank = None if node.inputs[0].shape is None else len(node.inputs[0].shape)
    if axes is None or int(node.attrs.get("keepdims", 1)) != 1:
        return False
    return [int(axis) for axis in axes] in ([-1], [None if rank is None else rank - 1])
