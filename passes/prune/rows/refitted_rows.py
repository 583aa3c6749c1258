"""What passes have in common that leave out rows of a weight and fit the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import Model
from onnxslim_llm.products.selection import compile_patterns
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Pass
from onnxslim_llm.rewrite.stage import Stage

__all__ = ["RefittedRows"]


@dataclass(frozen=True)
class RefittedRows(Pass):
    """Base of these passes, with the options that they share.

    Attributes:
        share: What goes, at least 0 and below 1.
        refit: With data, fit the rows that are left by least squares.
        exclude: Regular expressions; what has a match in its name is left alone.
    """

    group: ClassVar[str] = "prune"
    lossless: ClassVar[bool] = False
    structural: ClassVar[bool] = True
    stage: ClassVar[Stage] = Stage.PRUNE

    share: float = 0.25
    refit: bool = True
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            what = f"share = {self.share} is not possible"
            raise UsageError(what, where=self.name, todo="choose at least 0 and less than 1, such as 0.25")
        compile_patterns(self.exclude, f"{self.name}.exclude")

    @property
    def wants_statistics(self) -> bool:
        """Whether calibration data are needed."""
        return self.refit

    def requires(self, model: Model, context: Context) -> None:
        """Check that there are data where they are needed.

        Raises:
            UsageError: There are none.
        """
        if self.wants_statistics:
            what = "what is left cannot be fitted without calibration data"
            context.need_statistics(what, self.name, "set refit=false")
