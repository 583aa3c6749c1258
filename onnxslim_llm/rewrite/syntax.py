"""The textual form of a pipeline: `fuse_rms_norm, quantize_weights{bits=4, exclude=["lm_head"]}`.

One notation for the command line, recipes, manifests and tests. Values are TOML values; a bare word is a string.
"""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

from onnxslim_llm.errors import UsageError

__all__ = ["format_pipeline", "format_step", "format_value", "parse_pipeline", "parse_value", "split_items"]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PAIRS = {"{": "}", "[": "]"}


def parse_value(text: str) -> Any:
    """Return the TOML value that `text` spells; a bare word is taken as a string."""
    text = text.strip()
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def parse_pipeline(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the steps of a textual pipeline as (pass name, options).

    Raises:
        UsageError: The text does not follow the notation; the message shows the place.
    """
    steps = []
    for part in split_items(text, text):
        match = _NAME.match(part)
        if match is None:
            raise UsageError(f"a pass name is expected at '{part}'", where=text, todo="write: name{option=value, ...}")
        name, rest = match.group(), part[match.end() :].strip()
        if rest and not (rest.startswith("{") and rest.endswith("}")):
            raise UsageError(f"unexpected '{rest}' after '{name}'", where=text, todo="write: name{option=value, ...}")
        options: dict[str, Any] = {}
        for item in split_items(rest[1:-1], text) if rest else ():
            key, equals, value = item.partition("=")
            if not equals or not _NAME.fullmatch(key.strip()):
                raise UsageError(f"'{item}' is not of the form option=value", where=text)
            options[key.strip()] = parse_value(value)
        steps.append((name, options))
    return steps


def format_step(name: str, options: dict[str, Any]) -> str:
    """Return one step as text that `parse_pipeline` reads back."""
    if not options:
        return name
    return name + "{" + ", ".join(f"{key}={format_value(value)}" for key, value in options.items()) + "}"


def format_pipeline(steps: list[tuple[str, dict[str, Any]]]) -> str:
    """Return a pipeline as text that `parse_pipeline` reads back."""
    return ", ".join(format_step(name, options) for name, options in steps)


def format_value(value: Any) -> str:
    """Return the TOML text of a value."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {format_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(format_value(v) for v in value) + "]"
    return json.dumps(value)  # TOML's strings, numbers and booleans are JSON's


def split_items(text: str, whole: str) -> list[str]:
    """Return the parts of `text` between commas that are outside of brackets and quotes; empty parts vanish.

    Raises:
        UsageError: A bracket or quote is not closed; `whole` is shown.
    """
    parts, start, closers, quote, escaped = [], 0, [], "", False
    for i, char in enumerate(text):
        if quote:
            if char == quote and not escaped:
                quote = ""
            escaped = char == "\\" and not escaped and quote == '"'  # TOML escapes only between double quotes
        elif char in "\"'":
            quote = char
        elif char in _PAIRS:
            closers.append(_PAIRS[char])
        elif char in _PAIRS.values():
            if not closers or closers.pop() != char:
                raise UsageError(f"unbalanced '{char}'", where=whole)
        elif char == "," and not closers:
            parts.append(text[start:i])
            start = i + 1
    if closers or quote:
        raise UsageError(f"'{quote or closers[-1]}' is missing at the end", where=whole)
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]
