"""Errors as part of the interface: what happened, where, and what to do about it.

Every failure that a user can cause or meet is a `SlimError`; its `exit_code` is the process's exit code.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "CompilerBug",
    "GateError",
    "ModelError",
    "ResourceError",
    "SlimError",
    "UsageError",
    "did_you_mean",
]


class SlimError(Exception):
    """Base of all errors that the compiler raises on purpose.

    Args:
        what: One line: what happened.
        where: File, node, tensor or option that is concerned; empty if the message says it.
        todo: One line: what the user can do about it.
    """

    exit_code = 70

    def __init__(self, what: str, *, where: str = "", todo: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.todo = todo

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.todo:
            lines.append(f"  to do: {self.todo}")
        return "\n".join(lines)


class UsageError(SlimError):
    """An unknown option, pass, target or recipe, or a value that makes no sense."""

    exit_code = 2


class ModelError(SlimError):
    """The input is no valid or no supported model."""

    exit_code = 3


class GateError(SlimError):
    """The artifact did not pass its gates; nothing was published.

    Attributes:
        manifest: The manifest with the failing figures, where there is one.
    """

    exit_code = 4
    manifest: object | None = None


class ResourceError(SlimError):
    """Disk, memory, permission or a missing runtime stopped the work."""

    exit_code = 5


class CompilerBug(SlimError):  # noqa: N818 (it is one)
    """The compiler itself is wrong: the message names the pass and how to reproduce it."""

    exit_code = 70


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint for a mistyped `word`: the nearest known words, or all of them if none is near."""
    words = sorted(known)
    near = get_close_matches(word, words, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(f"'{w}'" for w in near) + "?"
    return "known: " + ", ".join(words)
