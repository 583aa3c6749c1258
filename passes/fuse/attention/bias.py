"""The masks of an attention as one tensor that is added to the scores: the steps are replayed on it in their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.ir.shapes import SymbolicValues
from onnxslim_llm.passes.fuse.attention.arrange import Arrangement, arrange
from onnxslim_llm.passes.fuse.attention.axes import Atom, View, leaves
from onnxslim_llm.passes.fuse.attention.products import NotAttentionError
from onnxslim_llm.passes.fuse.attention.scores import Mask
from onnxslim_llm.rewrite.edit import Builder

__all__ = ["emit_bias", "lift_masks"]


def lift_masks(masks: Sequence[Mask], wanted: View, values: SymbolicValues) -> list[Arrangement]:
    """Return for each mask how its operand is brought to four axes.

    Args:
        masks: Steps.
        wanted: Axes [B, H, S, T] of the scores.
        values: Shapes.

    Raises:
        NotAttentionError: A mask has an unknown rank, or a layout that cannot be had.
    """
    return [Arrangement() if mask.operand is None else _lift(mask.operand, mask.view, wanted, values) for mask in masks]


def _lift(operand: gs.Tensor, scores: View, wanted: View, values: SymbolicValues) -> Arrangement:
    shape = values.shape_of(operand)
    if shape is None or len(shape) > len(scores):
        raise NotAttentionError("the rank of a mask is not known", operand)
    axes = scores[len(scores) - len(shape) :]
    source: View = [[] if dim == 1 else axis for dim, axis in zip(shape, axes, strict=True)]
    present = {id(atom) for axis in source for atom in leaves(axis)}
    target: View = []
    for axis in wanted:
        atoms: list[Atom] = leaves(axis)
        there = [atom for atom in atoms if id(atom) in present]
        if there and len(there) != len(atoms):
            raise NotAttentionError("a mask is the same for some heads of a group only", operand)
        target.append(there)
    arrangement = arrange(source, target)
    if arrangement is None:
        raise NotAttentionError("the layout of a mask cannot be written with four axes", operand)
    return arrangement


def emit_bias(
    op: Builder, masks: Sequence[Mask], lifted: Sequence[Arrangement], dtype: np.dtype[Any]
) -> gs.Tensor | None:
    """Return the tensor [B|1, H|1, S|1, T|1] that does to scores by addition what the masks do; None without masks."""
    bias: gs.Tensor | None = None
    for mask, arrangement in zip(masks, lifted, strict=True):
        operand = arrangement.emit(op, mask.operand) if mask.operand is not None else None
        if mask.kind == "add":
            bias = operand if bias is None else op.Add(bias, operand)
            continue
        if mask.kind == "scale":
            bias = op.Mul(bias, op.constant(np.array(mask.value, dtype)))
            continue
        # A score is lost in the rounding when it is added to the lowest number: it becomes that number.
        value = op.constant(np.array(mask.value if mask.value == -np.inf else np.finfo(dtype).min, dtype))
        before = op.constant(np.zeros((), dtype)) if bias is None else bias
        if mask.kind == "keep":
            bias = op.Where(operand, before, value)
        elif mask.kind == "drop":
            bias = op.Where(operand, value, before)
        else:
            bias = op.Max(before, value)
    return bias
