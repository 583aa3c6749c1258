"""What all verbs share: --json, -q and -v, and where each kind of output goes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Output", "output_options", "to_json"]

R = TypeVar("R")


@dataclass(frozen=True)
class Output:
    """Where results and remarks go.

    Attributes:
        json: Results are JSON on stdout, and nothing else is there.
        quiet: No remarks, tables and progress; results and errors stay.
        verbose: More remarks.
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False

    @property
    def live(self) -> bool:
        """Whether progress may be drawn: somebody is looking."""
        return not self.quiet and sys.stderr.isatty()

    def result(self, data: Any, *renderables: Any) -> None:
        """Print the result of a verb: `data` as JSON with --json, else the tables, to stdout."""
        if self.json:
            click.echo(to_json(data))
            return
        console = _console(stderr=False)
        for renderable in renderables:
            console.print(renderable)

    def show(self, *renderables: Any) -> None:
        """Print tables to stderr, unless quiet."""
        if not self.quiet:
            console = _console(stderr=True)
            for renderable in renderables:
                console.print(renderable)

    def note(self, text: str) -> None:
        """Print a remark to stderr, unless quiet."""
        if not self.quiet:
            click.echo(click.style("note: ", fg="cyan") + text, err=True)


def _console(*, stderr: bool) -> Console:
    """A console that leaves it to the caller what a reader that has gone means; rich would exit with 1."""
    from rich.console import Console

    class _Piped(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return _Piped(stderr=stderr, highlight=False, soft_wrap=False)


def to_json(data: Any) -> str:
    """Indented JSON; not a number and infinity become null."""
    return json.dumps(_plain(data), indent=2)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | bool | None) else str(value)


def output_options(function: Callable[..., R]) -> Callable[..., R]:
    """Add --json, -q and -v to a command; it gets them as one `output` argument."""

    def call(*args: Any, as_json: bool, quiet: bool, verbose: bool, **kwargs: Any) -> R:
        return function(*args, output=Output(as_json, quiet, verbose), **kwargs)

    call.__doc__, call.__name__ = function.__doc__, function.__name__
    call.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
    call = click.option("-v", "--verbose", is_flag=True, help="Say more; a traceback with an error.")(call)
    call = click.option("-q", "--quiet", is_flag=True, help="No remarks and no progress.")(call)
    return click.option("--json", "as_json", is_flag=True, help="The result as JSON on stdout.")(call)
