"""Joins without operands that have no elements."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from onnxslim_llm.ir.shapes import shape_of
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["drop_empty_operands"]


def drop_empty_operands(model: Model) -> int:
    """Leave operands of Concat out that are known to have no elements; returns of how many nodes.

    A node whose operands are all empty keeps them.
    """
    changed = 0
    for graph in model.graphs():
        for node in graph.nodes:
            if node.op != "Concat" or normal_domain(node.domain) != "":
                continue
            kept = [tensor for tensor in node.inputs if 0 not in (shape_of(tensor) or ())]
            if kept and len(kept) < len(node.inputs):
                _keep(node, kept)
                changed += 1
    return changed


def _keep(node: gs.Node, tensors: list[gs.Tensor]) -> None:
    node.inputs.clear()
    node.inputs.extend(tensors)
