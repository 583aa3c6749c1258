"""How exporters keep queries that see no key from becoming NaN: their weights are replaced by 0."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.passes.fuse.attention.scores import producer
from onnxslim_llm.rewrite.constants import constant_value

__all__ = ["guard_against_empty_rows", "guard_against_nan"]

#: Quantifier over the keys (None: there is one answer for each key), and whether it asks for hidden ones.
_Claim = tuple[str | None, bool]
#: Nodes that say whether a row is empty; torch writes six.
MOST_STEPS = 16

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


def guard_against_empty_rows(
    where: gs.Node, weights: gs.Tensor, scores: gs.Tensor, bias: gs.Tensor | None
) -> list[gs.Node] | None:
    """Return the nodes of Where(a row is -inf everywhere, 0, weights), or None if `where` is something else.

    Args:
        where: Reads the weights.
        weights: Output of the Softmax.
        scores: Input of the Softmax.
        bias: The mask that was added to them; a row of it can be asked instead, if there is no other mask.
    """
    if where.op != "Where" or where.inputs[2] is not weights or not _is_zero(where.inputs[1]):
        return None
    nodes: list[gs.Node] = []
    if _claim(where.inputs[0], scores, nodes) == ("all", True):
        return [*nodes, where]
    if bias is not None and _claim(where.inputs[0], bias, []) == ("all", True):
        return [where]
    return None


def _is_zero(tensor: gs.Tensor) -> bool:
    node = producer(tensor)
    if node is not None and node.op == "Expand":
        tensor = node.inputs[0]
    elif node is not None and node.op == "ConstantOfShape":
        if "value" not in node.attrs:
            return True
        tensor = node.attrs["value"]
    value = constant_value(tensor)
    return value is not None and not value.any()


def _claim(tensor: gs.Tensor, rows: gs.Tensor, nodes: list[gs.Node]) -> _Claim | None:
    """Return what a tensor of booleans (or 0 and 1) says about `rows`; collect the nodes that make it."""
    chain: list[gs.Node] = []
    node = producer(tensor)
    while node is not None and node.op in ("Cast", "Not", *_QUANTIFIERS) and len(chain) < MOST_STEPS:
        chain.append(node)
        node = producer(node.inputs[0])
    claim = _comparison(node, rows, nodes) if node is not None and node.op in ("Equal", "IsInf") else None
    for step in reversed(chain):
        if claim is None:
            return None
        quantifier, hidden = claim
        if step.op == "Not":  # no key is seen: all are hidden
            claim = _DUAL[quantifier], not hidden
        elif step.op in _QUANTIFIERS:
            claim = (_QUANTIFIERS[step.op], hidden) if quantifier is None and _runs_over_keys(step) else None
    nodes += chain
    return claim


def _comparison(node: gs.Node, rows: gs.Tensor, nodes: list[gs.Node]) -> _Claim | None:
    """Return what a comparison with -inf of `rows`, or of the largest element of each row, says."""
    nodes.append(node)
    values = [constant_value(operand, limit=1) for operand in node.inputs]
    if node.op == "IsInf":
        asks = int(node.attrs.get("detect_negative", 1)) == 1 and int(node.attrs.get("detect_positive", 1)) == 0
    else:
        asks = any(value is not None and bool(np.all(value == -np.inf)) for value in values)
    if not asks:
        return None
    for operand in node.inputs:
        largest = producer(operand)
        if operand is rows:
            return None, True
        if largest is not None and largest.op == "ReduceMax" and largest.inputs[0] is rows and _runs_over_keys(largest):
            nodes.append(largest)
            return "all", True
    return None


def _runs_over_keys(node: gs.Node) -> bool:
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1:
        axes = constant_value(node.inputs[1])
    rank = None if node.inputs[0].shape is None else len(node.inputs[0].shape)
    if axes is None or int(node.attrs.get("keepdims", 1)) != 1:
        return False
    return [int(axis) for axis in axes] in ([-1], [None if rank is None else rank - 1])
