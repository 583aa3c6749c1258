"""Nothing is written that the target does not accept: its lint is part of every compile."""

from __future__ import annotations

from pathlib import Path

from onnxslim_llm.errors import GateError
from onnxslim_llm.ir.model import Model, open_model
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.targets import Target, Violation

__all__ = ["IllegalGraphError", "check_legal"]

_SHOWN = 5


class IllegalGraphError(GateError):
    """The target does not accept the lowered graph; nothing was published.

    Attributes:
        violations: All of them.
    """

    violations: tuple[Violation, ...] = ()


def check_legal(model: Model, target: Target, source: Path) -> None:
    """Check a lowered graph against the rules of its target.

    Args:
        model: What would be written.
        target: Whose rules count. Where these are not the last word (`Target.lint_is_final`), only what the source has
            not broken itself counts: its own operators of unknown domains are the user's.
        source: The .onnx file.

    Raises:
        IllegalGraphError: It breaks one; node, rule and remedy are named.
    """
    infer_shapes(model)
    found = target.lint(model)
    if found and not target.lint_is_final:
        before = {(violation.where, violation.rule) for violation in target.lint(open_model(source))}
        found = [violation for violation in found if (violation.where, violation.rule) not in before]
    if not found:
        return
    listed = "; ".join(f"{violation.where}: {violation.rule}" for violation in found[:_SHOWN])
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    error = IllegalGraphError(
        f"target '{target.name}' does not accept what came out, {len(found)} violation(s): {listed}{more}; nothing was "
        "published",
        where=found[0].where,
        todo=found[0].fix,
    )
    error.violations = tuple(found)
    raise error
