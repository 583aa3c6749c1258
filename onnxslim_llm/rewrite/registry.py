"""All passes by name: the explicit tuple of the project's own, and those of third parties' entry points."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from pydantic import TypeAdapter, ValidationError

from onnxslim_llm.errors import UsageError, did_you_mean
from onnxslim_llm.rewrite.passes import Pass

__all__ = ["all_passes", "check_options", "make_pass"]


@cache
def all_passes() -> Mapping[str, type[Pass]]:
    """Return every known pass class by name.

    Raises:
        UsageError: A third-party pass cannot be imported or takes a name that exists.
    """
    # By name, because passes/ depends on this package and not the other way round.
    found: dict[str, type[Pass]] = {p.name: p for p in import_module("onnxslim_llm.passes").PASSES}
    for entry in entry_points(group="onnxslim_llm.passes"):
        try:
            plugin = entry.load()
        except Exception as error:  # a broken plug-in is the user's to remove, whatever it raises
            raise UsageError(
                f"the pass plug-in '{entry.name}' cannot be imported: {error}",
                where=entry.value,
                todo="repair or uninstall the package that brings it",
            ) from error
        if not (isinstance(plugin, type) and issubclass(plugin, Pass)):
            raise UsageError(
                f"the pass plug-in '{entry.name}' is no Pass",
                where=entry.value,
                todo="repair or uninstall the package that brings it",
            )
        if plugin.name in found:
            raise UsageError(f"two passes are called '{plugin.name}'", where=entry.value)
        found[plugin.name] = plugin
    return found


def make_pass(name: str, options: Mapping[str, Any]) -> Pass:
    """Return the pass `name` with these options.

    Raises:
        UsageError: Unknown pass, unknown option, or a value of the wrong type or range.
    """
    check_options(name, options)
    kind = all_passes()[name]
    try:
        return _adapter(kind).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([name, *(str(p) for p in first["loc"])])
        raise UsageError(f"{where}: {first['msg']}", where=f"value {first.get('input')!r}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{name}: {error}") from error


def check_options(name: str, options: Iterable[str], where: str = "") -> None:
    """Check that there is a pass of this name and that it has these options.

    Raises:
        UsageError: One of them is unknown; it has the nearest known names, and `where`.
    """
    known = all_passes()
    if name not in known:
        raise UsageError(f"unknown pass '{name}'", where=where, todo=did_you_mean(name, known))
    names = [field.name for field in fields(known[name])]
    for option in options:
        if option not in names:
            hint = did_you_mean(option, names) if names else "the pass takes no options"
            raise UsageError(f"pass '{name}' has no option '{option}'", where=where, todo=hint)


@cache
def _adapter(kind: type[Pass]) -> TypeAdapter[Pass]:
    return TypeAdapter(kind)
