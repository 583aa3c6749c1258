"""The model in a newer version of ai.onnx."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from onnxslim_llm.concepts.concept import follow_opset
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir import opset
from onnxslim_llm.rewrite.passes import Change, Pass

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["ConvertOpset"]


@dataclass(frozen=True)
class ConvertOpset(Pass):
    """Convert the model to a newer version of ai.onnx, so that lowering has its operators.

    `compile --opset N` runs this pass before the target's lowering.

    Before:
        <opset_import: ["" : 18]>
    After:
        <opset_import: ["" : 24]>
    Skips when:
        - the model has this version already.

    Attributes:
        version: The wanted opset; 0 leaves the model as it is.
    """

    name: ClassVar[str] = "convert_opset"
    group: ClassVar[str] = "lower"
    lossless: ClassVar[bool] = False  # it was asked for: no artifact of another version takes its place

    version: int = 0

    def requires(self, model: Model, context: Context) -> None:
        """Check that the version is newer and that the target takes it.

        Raises:
            UsageError: It is not.
        """
        have = model.opset() or 0
        if self.version and self.version < have:
            raise UsageError(
                f"the model has opset {have} by now: it cannot be converted down to {self.version}",
                where=self.name,
                todo=f"choose {have} or more, or a recipe that needs no newer opset",
            )
        if context.target is not None and self.version:
            context.target.check_opset(self.version)

    def apply(self, model: Model, context: Context) -> Change:
        """Convert all graphs and functions.

        Raises:
            UsageError: The installed onnx does not know the version.
            ModelError: A node cannot be converted; it is named.
        """
        change = Change()
        have = model.opset() or 0
        if self.version > have:
            change.sites = opset.convert_opset(model, self.version)
            follow_opset(model)
            change.detail["opset"] = [have, self.version]
        return change
