"""The target's lint is part of every compile: what a target that says so does not accept is not written."""

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


def check_legal(model: Model, target: Target, source: Path) -> list[str]:
    """Check a lowered graph against the rules of its target.

    Args:
        model: What would be written.
        target: Whose rules count.
        source: The .onnx file.

    Returns:
        What is to be told, where the rules are not the last word (`Target.lint_is_final`): the runtime says in the
        verification whether it takes the graph, and a pass that broke it is undone. What the source has not kept to
        itself, such as operators of the user's own, is not told.

    Raises:
        IllegalGraphError: It breaks one that is the last word; node, rule and remedy are named.
    """
    infer_shapes(model)
    found = target.lint(model)
    if found and not target.lint_is_final:
        before = {violation.where for violation in target.lint(open_model(source))}
        fresh = [violation for violation in found if violation.where not in before]
        return [f"{v.where}: {v.rule}; {v.fix}" for v in fresh[:_SHOWN]]
    if not found:
        return []
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
