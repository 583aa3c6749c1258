"""onnxslim-llm targets."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxslim_llm.cli.output import Output, output_options
from onnxslim_llm.cli.params import PATH

if TYPE_CHECKING:
    from onnxslim_llm.targets import Target

__all__ = ["command"]

_EXIT_GATE = 4
_MANY_OPERATORS = 8


@click.command("targets")
@click.argument("name", required=False)
@click.option("--check", metavar="MODEL", type=PATH, help="Run MODEL in every runtime that is installed, and compare.")
@click.option("--only", metavar="NAME", multiple=True, help="With --check: ask these runtimes only.")
@click.option("--every-form", is_flag=True, help="With --check: tell about every form that was tried.")
@click.option("--seconds", type=click.IntRange(min=1), default=600, show_default=True, help="Time limit of a runtime.")
@click.option("--lint-only", "lint", metavar="MODEL", type=PATH, help="Tell what in MODEL the target does not accept.")
@click.option("--target", metavar="NAME", help="With --lint-only: the target.")
@click.option("--shape", metavar="NAME=SIZE,...", default="", help="Sizes of symbolic dimensions.")
@output_options
def command(
    name: str | None,
    check: Path | None,
    only: tuple[str, ...],
    every_form: bool,
    seconds: int,
    lint: Path | None,
    target: str | None,
    shape: str,
    output: Output,
) -> None:
    """List the targets and what is installed here, or tell all about the target NAME.

    With --check, tell which runtimes run a model; with --lint-only, what keeps it from a target (exit code 4 if
    something does).
    """
    from onnxslim_llm.report.tables import plain_table
    from onnxslim_llm.targets import all_targets, get_target

    if check is not None:
        _check(check, only, shape, seconds, every_form, output)
        return
    if lint is not None:
        _lint(lint, target or name, shape, output)
        return
    if name is not None:
        account = _account(get_target(name))
        facts = [[key.replace("_", " "), _text(value)] for key, value in account.items()]
        output.result(account, plain_table(["", ""], facts))
        return
    accounts = [_account(target) for target in all_targets().values()]
    rows = [[a["name"], a["runtime"], a["description"].split(". ")[0].rstrip(".")] for a in accounts]
    output.result(accounts, plain_table(["=target", "runtime here", "what it is for"], rows))


def _check(model: Path, only: tuple[str, ...], shape: str, seconds: int, every_form: bool, output: Output) -> None:
    from onnxslim_llm.compiler.portability import Checker
    from onnxslim_llm.consumers.consumer import CONSUMERS
    from onnxslim_llm.errors import UsageError, did_you_mean
    from onnxslim_llm.report.tables import plain_table

    known = {consumer.name: consumer for consumer in CONSUMERS}
    for name in only:
        if name not in known:
            raise UsageError(f"unknown runtime '{name}'", where="--only", todo=did_you_mean(name, known))
    chosen = [known[name] for name in only] or list(CONSUMERS)
    checker = Checker(model, shape, float(seconds))
    reports = []
    for report in checker.run(chosen, every_form=every_form):
        reports.append(report)
        if output.live and not output.json:
            output.note(f"{report.consumer}: {report.status}")
    for note in checker.notes if not output.json else ():
        output.note(note)
    rows = [[known[r.consumer].title, r.form or "", r.status, _figure(r.max_abs), _why(asdict(r))] for r in reports]
    data = {"model": str(model), "notes": checker.notes, "reports": [asdict(report) for report in reports]}
    output.result(data, plain_table(["=runtime", "form", "status", "max |difference|", ""], rows))


def _why(report: dict[str, Any]) -> str:
    operators = report["unsupported"]
    if operators:
        more = f" and {len(operators) - _MANY_OPERATORS} more" if len(operators) > _MANY_OPERATORS else ""
        return f"no {', '.join(operators[:_MANY_OPERATORS])}{more}"
    return str(report["detail"])


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _lint(model: Path, name: str | None, shape: str, output: Output) -> None:
    from onnxslim_llm.errors import UsageError
    from onnxslim_llm.ir.model import open_model
    from onnxslim_llm.ir.shapes import infer_shapes
    from onnxslim_llm.rewrite.pipeline import Pipeline
    from onnxslim_llm.targets import get_target

    if name is None:
        todo = "`onnxslim-llm targets` lists them"
        raise UsageError("--lint-only needs a target", where="--target NAME", todo=todo)
    target = get_target(name)
    opened = open_model(model)
    if shape:
        Pipeline(f'fix_shapes{{sizes="{shape}"}}').run(opened)
    infer_shapes(opened)
    found = target.lint(opened)
    data = {"model": str(model), "target": target.name, "violations": [asdict(violation) for violation in found]}
    if found:
        lines = [f"{violation.where}\n  {violation.rule}\n  to do: {violation.fix}" for violation in found]
        output.result(data, "\n".join(lines))
        raise click.exceptions.Exit(_EXIT_GATE)
    output.result(data, f"target {target.name} accepts the model")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return "\n".join(f"{key} = {item}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(str(item) or "ai.onnx" for item in value) or "none"
    return str(value)


def _account(target: Target) -> dict[str, Any]:
    installed, why = target.installed()
    return {
        "name": target.name,
        "description": target.description,
        "installed": installed,
        "runtime": why,
        "domains": sorted(target.domains),
        "min_opset": target.min_opset,
        "max_opset": target.max_opset,
        "fixed_shapes": target.fixed_shapes,
        "weight_bits": list(target.weight_bits),
        "session_config": dict(target.session_config),
    }
