"""onnxslim-llm targets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from onnxslim_llm.cli.output import Output, output_options

if TYPE_CHECKING:
    from onnxslim_llm.targets import Target

__all__ = ["command"]


@click.command("targets")
@click.argument("name", required=False)
@output_options
def command(name: str | None, output: Output) -> None:
    """List the targets and what is installed here, or tell all about the target NAME."""
    from onnxslim_llm.report.tables import plain_table
    from onnxslim_llm.targets import all_targets, get_target

    if name is not None:
        account = _account(get_target(name))
        facts = [[key.replace("_", " "), _text(value)] for key, value in account.items()]
        output.result(account, plain_table(["", ""], facts))
        return
    accounts = [_account(target) for target in all_targets().values()]
    rows = [[a["name"], a["runtime"], a["description"].split(". ")[0].rstrip(".")] for a in accounts]
    output.result(accounts, plain_table(["=target", "runtime here", "what it is for"], rows))


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
        "weight_bits": list(target.weight_bits),
        "session_config": dict(target.session_config),
    }
