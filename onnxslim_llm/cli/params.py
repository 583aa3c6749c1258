"""Values of options that have their own notation."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from onnxslim_llm.errors import UsageError

__all__ = ["PATH", "pairs", "parse_size", "size_option"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Bytes of '800MB', '1.5 GiB', '2g' or '123456'.

    Raises:
        ValueError: It is no size, or not positive.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
    if not found:
        raise ValueError(f"'{text}' is no size; write it like 800MB or 1.5GiB")
    size = round(float(found.group(1)) * _UNITS[(found.group(2) or "").lower()])
    if size < 1:
        raise ValueError(f"'{text}' is not positive")
    return size


def size_option(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """Callback of an option that takes a size."""
    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def pairs(texts: Iterable[str], option: str) -> dict[str, str]:
    """Return the options of NAME=VALUE texts by name.

    Raises:
        UsageError: A text is of another form.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"'{text}' is no NAME=VALUE", where=option)
        found[name.strip()] = value.strip()
    return found


class _Path(click.Path):
    """A path; an empty text is none, though it would mean the working folder to pathlib (an unset shell variable)."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


PATH = _Path(path_type=Path)
