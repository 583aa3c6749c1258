"""Means as products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from onnxslim_llm.ir.shapes import ensure_shapes, shape_of
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.engine import apply_rules
from onnxslim_llm.rewrite.matcher import Match
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.pattern import PatternBuilder
from onnxslim_llm.rewrite.rule import Refusal, Rule

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["LegalizeMeans"]


class _LastAxis(Rule):
    name = "mean along the last axis -> product"
    explain = True
    near = 1

    def pattern(self, op: PatternBuilder, x: Any) -> Any:
        """Match a mean that keeps its axis."""
        return op.ReduceMean(x, axes=[-1], keepdims=1)

    def check(self, match: Match) -> Refusal | None:
        """Check that the size is known."""
        x = match["x"]
        shape = shape_of(x)
        if x.dtype is None or np.dtype(x.dtype).kind != "f":
            return Refusal("it is no mean of floats", x.name)
        if not shape or len(shape) < 2 or not isinstance(shape[-1], int) or shape[-1] < 1:
            return Refusal("the size of the axis is not known", x.name)
        return None

    def rewrite(self, op: Builder, match: Match) -> Any:
        """Multiply with a column of equal parts."""
        x = match["x"]
        size = int(shape_of(x)[-1])  # type: ignore[index, arg-type]  # checked
        return op.MatMul(x, np.full((size, 1), 1 / size, x.dtype))


@dataclass(frozen=True)
class LegalizeMeans(Pass):
    """Write means along the last axis as products with a column of equal parts.

    For converters that read the axes of a reduction from an attribute only, and reduce over all axes where they are an
    input, as they are since opset 18: the model then runs, and gives something else.

    Before:
        m = ReduceMean <keepdims = 1> (x, [-1])
    After:
        m = MatMul (x, column)
    Skips when:
        - the mean is along other axes, or its axis goes
        - the size of the axis is not known.
    """

    name: ClassVar[str] = "legalize_means"
    group: ClassVar[str] = "lower"
    lossless: ClassVar[bool] = False  # converters that need it give wrong results without

    def apply(self, model: Model, context: Context) -> Change:
        """Rewrite all means."""
        ensure_shapes(model)
        return apply_rules(model, [_LastAxis()])
