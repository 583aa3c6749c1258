"""Passes that change weights have a legal order: fold, rotate, prune, split, quantize, compensate."""

from __future__ import annotations

from collections.abc import Sequence

from onnxslim_llm.errors import UsageError
from onnxslim_llm.rewrite.passes import Pass

__all__ = ["check_order"]


def check_order(passes: Sequence[Pass]) -> None:
    """Check that no pass comes after one of a later stage.

    Raises:
        UsageError: One does; it says which, and why that makes no sense.
    """
    latest: Pass | None = None
    for step in passes:
        if step.stage is None:
            continue
        if latest is not None and latest.stage is not None and step.stage < latest.stage:
            raise UsageError(
                f"'{step.name}' cannot come after '{latest.name}': {latest.stage.assumption}",
                where="order of the passes",
                todo=f"put '{step.name}' before '{latest.name}'",
            )
        latest = step
