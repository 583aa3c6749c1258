"""A bias as a sum: the masks in it, one by one, and the rest (ALiBi, relative positions) that is no mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.passes.fuse.masks.meaning import MASKED, Unclear
from onnxslim_llm.passes.fuse.masks.proof import Proven
from onnxslim_llm.rewrite.constants import constant_value
from onnxslim_llm.rewrite.schema import normal_domain

__all__ = ["Split", "split_bias"]

Prove = Callable[[gs.Tensor], Proven | Unclear]


@dataclass
class Split:
    """A bias taken apart.

    Attributes:
        masks: What was proven; keys are visible where all of them say so.
        rest: Tensors whose sum is the bias of the visible keys.
        reasons: Why the rest is no mask, tensor by tensor.
    """

    masks: list[Proven] = field(default_factory=list)
    rest: list[gs.Tensor] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def split_bias(bias: gs.Tensor, prove: Prove) -> Split:
    """Take a bias apart as far as needed: a sum, or a choice between something and the lowest value, has two parts."""
    split = Split()
    _take_apart(bias, prove, split)
    return split


def _take_apart(tensor: gs.Tensor, prove: Prove, split: Split) -> None:
    proven = prove(tensor)
    if isinstance(proven, Proven):
        split.masks.append(proven)
        return
    node = tensor.inputs[0] if isinstance(tensor, gs.Variable) and len(tensor.inputs) == 1 else None
    if node is not None and normal_domain(node.domain) == "":
        if node.op == "Add":
            for operand in node.inputs:
                _take_apart(operand, prove, split)
            return
        if node.op == "Identity":
            _take_apart(node.inputs[0], prove, split)
            return
        if node.op == "Where" and _lowers(node.inputs[2]):
            condition = prove(node.inputs[0])
            if isinstance(condition, Proven):
                split.masks.append(condition)
                _take_apart(node.inputs[1], prove, split)
                return
            proven = condition
    split.rest.append(tensor)
    split.reasons.append(proven.reason)


def _lowers(tensor: gs.Tensor) -> bool:
    value = constant_value(tensor)
    return value is not None and value.size == 1 and value.dtype.kind == "f" and bool(np.all(value <= MASKED))
