"""onnxslim-llm passes."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

import click

from onnxslim_llm.cli.output import Output, output_options

if TYPE_CHECKING:
    from onnxslim_llm.rewrite.passes import Pass

__all__ = ["command"]


@click.command("passes")
@click.argument("name", required=False)
@output_options
def command(name: str | None, output: Output) -> None:
    """List all passes and recipes, or tell all about the pass NAME."""
    from onnxslim_llm.recipe import Recipe, preset_names
    from onnxslim_llm.report.tables import plain_table
    from onnxslim_llm.rewrite.registry import all_passes

    known = all_passes()
    if name is not None:
        found = _find(name, known)
        output.result(_account(found), *_page(found))
        return
    recipes = [Recipe.load(preset) for preset in preset_names()]
    data = {
        "passes": [_account(one) for one in known.values()],
        "recipes": [{"name": r.name, "description": r.description, "when": r.when} for r in recipes],
    }
    table = plain_table(
        ["=pass", "group", "exact", "what it does"],
        [[p.name, p.group, "yes" if p.lossless else "no", p.summary()] for p in known.values()],
    )
    presets = plain_table(
        ["=recipe", "what it does", "when to use it"], [[r.name, r.description, r.when] for r in recipes]
    )
    output.result(data, table, presets)


def _find(name: str, known: Any) -> type[Pass]:
    from onnxslim_llm.errors import UsageError, did_you_mean

    if name not in known:
        raise UsageError(f"unknown pass '{name}'", where="onnxslim-llm passes", todo=did_you_mean(name, known))
    found: type[Pass] = known[name]
    return found


def _account(kind: type[Pass]) -> dict[str, Any]:
    return {
        "name": kind.name,
        "group": kind.group,
        "lossless": kind.lossless,
        "summary": kind.summary(),
        "options": [{"name": f.name, "type": str(f.type), "default": _default(f)} for f in fields(kind)],
        "documentation": inspect.getdoc(kind) or "",
    }


def _default(field: Any) -> Any:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else None


def _page(kind: type[Pass]) -> list[Any]:
    from rich.text import Text

    from onnxslim_llm.report.tables import plain_table

    page: list[Any] = [Text(f"{kind.name} ({kind.group})", style="bold"), Text(inspect.getdoc(kind) or "")]
    options: list[list[Any]] = [[f.name, Text(str(f.type)), Text(repr(_default(f)))] for f in fields(kind)]
    if options:
        page.append(plain_table(["option", "type", "default"], options))
    return page
