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

    found = [get_target(name)] if name is not None else list(all_targets().values())
    accounts = [_account(target) for target in found]
    rows = [
        [
            a["name"],
            a["runtime"],
            f"{a['min_opset']}-{a['max_opset']}",
            a["description"],
        ]
        for a in accounts
    ]
    output.result(
        accounts[0] if name is not None else accounts,
        plain_table(["target", "runtime here", "opset", "what it is for"], rows),
    )


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
