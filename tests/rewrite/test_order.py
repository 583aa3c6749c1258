"""Passes that change weights in an order that makes no sense are refused with the reason."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import Model
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.order import check_order
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.stage import Stage


@dataclass(frozen=True)
class Rotation(Pass):
    """Rotate."""

    name: ClassVar[str] = "rotation"
    group: ClassVar[str] = "quantize"
    stage: ClassVar[Stage] = Stage.ROTATE

    def apply(self, model: Model, context: Context) -> Change:
        """Change nothing."""
        return Change()


@dataclass(frozen=True)
class Rounding(Rotation):
    """Round."""

    name: ClassVar[str] = "rounding"
    stage: ClassVar[Stage] = Stage.QUANTIZE


@dataclass(frozen=True)
class Anywhere(Rotation):
    """Tidy up."""

    name: ClassVar[str] = "anywhere"
    stage: ClassVar[Stage | None] = None  # type: ignore[misc]


def test_the_order_of_stages_is_legal() -> None:
    check_order([Rotation(), Anywhere(), Rounding(), Rounding(), Anywhere()])


def test_an_earlier_stage_after_a_later_one_is_refused() -> None:
    with pytest.raises(UsageError, match="'rotation' cannot come after 'rounding': quantized weights") as caught:
        check_order([Rounding(), Anywhere(), Rotation()])
    assert caught.value.todo == "put 'rotation' before 'rounding'"


@pytest.mark.parametrize("stage", [stage for stage in Stage if stage is not Stage.FOLD])
def test_every_stage_says_what_it_assumes(stage: Stage) -> None:
    assert stage.assumption
