"""Concepts need a recent opset: the model is converted first, but only if there is something to fuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnxslim_llm.concepts.concept import follow_opset
from onnxslim_llm.ir.opset import convert_opset
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.matcher import Matcher
from onnxslim_llm.rewrite.rule import Rule

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["CONCEPT_OPSET", "any_rule_fits", "raise_opset"]

#: The ai.onnx version that the bodies of all concepts of fusions are written in.
CONCEPT_OPSET = 18


def any_rule_fits(model: Model, rules: Sequence[Rule]) -> bool:
    """Return whether one of `rules` would rewrite something. Types and shapes are known already."""
    matcher = Matcher(model.opset, graph_output_ids(model))
    for graph in model.graphs():
        for node in graph.nodes:
            for rule in rules:
                if node.op in rule.root_ops:
                    match = matcher.find(rule.outputs, node, rule.keep_shared)
                    if match is not None and rule.check(match) is None:
                        return True
    return False


def raise_opset(model: Model, version: int = CONCEPT_OPSET) -> bool:
    """Convert an older model to `version`; nodes may be other objects afterwards. Return whether it was older.

    Raises:
        ModelError: A node cannot be converted; it is named.
    """
    if (model.opset() or 0) >= version:
        return False
    convert_opset(model, version)
    follow_opset(model)
    return True
