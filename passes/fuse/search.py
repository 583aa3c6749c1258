"""What comes before a fusion by rules: is there something to fuse, and does the model's opset have what it needs?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnxslim_llm.concepts.opset import raise_opset
from onnxslim_llm.ir.shapes import ensure_shapes, infer_shapes
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.matcher import Matcher
from onnxslim_llm.rewrite.passes import Change
from onnxslim_llm.rewrite.rule import Rule

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["any_rule_fits", "ready"]


def ready(model: Model, rules: Sequence[Rule], change: Change) -> bool:
    """Infer types and shapes, and convert an older model if there is something to fuse.

    Args:
        model: The model.
        rules: What will be applied.
        change: Told the new opset, or why the model stays as it is.

    Returns:
        Whether the rules may be applied.
    """
    infer_shapes(model)
    if any_rule_fits(model, rules):
        if not raise_opset(model, change):
            return False
        ensure_shapes(model)
    return True


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
