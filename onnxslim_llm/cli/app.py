"""The verbs, and which file each lives in; a verb's file is imported when it is used."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import Any

import click

from onnxslim_llm import __version__

__all__ = ["PROGRAM", "VERBS", "UnknownVerbError", "app"]

PROGRAM = "onnxslim-llm"

VERBS = {
    "compile": "Turn a model into a small, fast, verified artifact.",
    "inspect": "Tell what is in a model.",
    "diff": "Compare two models: operators, bytes, and numbers layer by layer.",
    "bench": "Measure speed, load time and memory.",
    "sweep": "Compile in many ways and find the best ones for each size.",
    "eval": "Measure perplexity and divergence on a text.",
    "generate": "Continue a text with a compiled model.",
    "passes": "List the passes and the recipes that are made of them.",
    "targets": "List the runtimes that an artifact can be made for.",
    "doctor": "Check what is installed here and whether it works.",
}

_CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class UnknownVerbError(click.UsageError):
    """A verb that does not exist; releases of click before 8.4 have no such error."""

    def __init__(self, name: str, ctx: click.Context) -> None:
        super().__init__(f"no such command '{name}'", ctx)
        self.possibilities = get_close_matches(name, VERBS)


class _LazyGroup(click.Group):
    """Knows its commands by name and imports the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = import_module(f"onnxslim_llm.cli.{cmd_name}_verb").command
        command.help = command.help or VERBS[cmd_name]
        command.context_settings = {**_CONTEXT, **command.context_settings}
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            raise UnknownVerbError(args[0], ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


_HELP = """Make ONNX language models small and fast enough for edge devices, and prove that they still work.

\b
onnxslim-llm compile model.onnx -o build/
onnxslim-llm generate build/ --prompt "def main():"
"""  # \b keeps the lines that follow it as they are


@click.group(cls=_LazyGroup, context_settings=_CONTEXT, invoke_without_command=True, help=_HELP)
@click.version_option(__version__, "-V", "--version", prog_name=PROGRAM)
@click.pass_context
def app(context: click.Context) -> None:
    """Show what there is."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
