"""Look-ups without conditions on their indices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.engine import apply_rules
from onnxslim_llm.rewrite.matcher import Match
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.pattern import PatternBuilder
from onnxslim_llm.rewrite.rule import Refusal, Rule
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["LegalizeIndices"]

_LOOK_UPS = ("Gather", "GatherElements")


class _Guarded(Rule):
    name = "negative ? out of bounds : index -> index"

    def pattern(self, op: PatternBuilder, index: Any) -> Any:
        """Match what sends negative indices out of bounds."""
        return op.Where(op.Less(index, 0), op.const("bound"), index)

    def check(self, match: Match) -> Refusal | None:
        """Check that the result is nothing but an index."""
        users = match.outputs[0].outputs
        if not users or not all(
            node.op in _LOOK_UPS and normal_domain(node.domain) == "" and node.inputs[1] is match.outputs[0]
            for node in users
        ):
            return Refusal("it is read as something else than an index", match.outputs[0].name)
        return None

    def rewrite(self, op: Builder, match: Match) -> Any:
        """Look up the index as it is."""
        return match["index"]


@dataclass(frozen=True)
class LegalizeIndices(Pass):
    """Look up without a guard that sends negative indices out of bounds.

    Neural processors neither select by booleans nor check indices. Token ids and positions are never negative; with a
    negative one, what was an error of the runtime becomes a wrong row.

    Before:
        at = Where (Less (position_ids, 0), 4096, position_ids)
        y = Gather (table, at)
    After:
        y = Gather (table, position_ids)
    Skips when:
        - the result is read as something else than an index.
    """

    name: ClassVar[str] = "legalize_indices"
    group: ClassVar[str] = "lower"
    lossless: ClassVar[bool] = False  # the target refuses the model without it

    def apply(self, model: Model, context: Context) -> Change:
        """Remove the guards."""
        return apply_rules(model, [_Guarded()])
