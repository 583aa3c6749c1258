"""Equations: nodes that compute nothing, or two where one will do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from onnxslim_llm.ir.shapes import ensure_shapes
from onnxslim_llm.passes.cleanup.rules_arithmetic import ARITHMETIC
from onnxslim_llm.passes.cleanup.rules_expand import EXPANDS
from onnxslim_llm.passes.cleanup.rules_layout import LAYOUT
from onnxslim_llm.passes.cleanup.rules_transpose import TRANSPOSES
from onnxslim_llm.passes.cleanup.rules_types import TYPES
from onnxslim_llm.rewrite.engine import apply_rules
from onnxslim_llm.rewrite.passes import Change, Pass

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["RULES", "SimplifyAlgebra"]

RULES = (*ARITHMETIC, *TYPES, *LAYOUT, *TRANSPOSES, *EXPANDS)


@dataclass(frozen=True)
class SimplifyAlgebra(Pass):
    """Apply equations that hold for every input: x * 1 = x, Transpose of Transpose, Cast to the type that it has, ...

    The equations are the tables in rules_arithmetic.py, rules_types.py, rules_layout.py, rules_transpose.py and
    rules_expand.py. Two Unsqueeze nodes in a row are left: runtimes look for them when they fuse attention.

    Before:
        agraph (float[N, 4] x) => (float[N, 4] y)
        <float one = {1.0}>
        {
            a = Mul (x, one)
            b = Transpose <perm = [1, 0]> (a)
            y = Transpose <perm = [1, 0]> (b)
        }

    After:
        agraph (float[N, 4] x) => (float[N, 4] y) {
            y = Identity (x)
        }

    Skips when:
        - the constant of an equation would broadcast its operand to another shape, or the shapes are not known
        - a type or rank that the equation depends on is not known
        - the result is an output of the model and there is no node that could take over its name
    """

    name: ClassVar[str] = "simplify_algebra"
    group: ClassVar[str] = "cleanup"

    def apply(self, model: Model, context: Context) -> Change:
        """Apply the rules to the top graph and its subgraphs until none of them fits."""
        ensure_shapes(model)
        return apply_rules(model, RULES)
