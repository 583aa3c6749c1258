"""From arguments to an exit code: every way a command can end, told in at most three lines."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType

import click

from onnxslim_llm.cli.app import PROGRAM, app
from onnxslim_llm.errors import SlimError

__all__ = ["INTERRUPTED", "run"]

INTERRUPTED = 128 + signal.SIGINT
_BROKEN_PIPE = 128 + signal.SIGPIPE
_USAGE = 2
_VERBOSE = frozenset({"-v", "--verbose"})


def run(arguments: Sequence[str]) -> int:
    """Run the command line `arguments` (without the program's name) and return the exit code."""
    verbose = not _VERBOSE.isdisjoint(arguments)
    try:
        with app.make_context(PROGRAM, list(arguments)) as context:
            app.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as end:
        return end.exit_code
    except (BrokenPipeError, KeyboardInterrupt, Exception) as error:
        return _failed(error, arguments, verbose)
    return 0


def _failed(error: BaseException, arguments: Sequence[str], verbose: bool) -> int:
    if isinstance(error, BrokenPipeError):
        # Whoever read our output has gone; what is still buffered must not fail at exit again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    if isinstance(error, KeyboardInterrupt):
        resumable = bool(arguments) and arguments[0] == "compile"
        _tell("interrupted", "", "the same command with --resume goes on where it stopped" if resumable else "")
        return INTERRUPTED
    if isinstance(error, click.ClickException):
        _tell(*_usage(error, arguments))
        return _USAGE
    if verbose:
        traceback.print_exception(error)
    shown = _as_slim_error(error, arguments)
    command = " ".join([PROGRAM, *arguments[:1]])
    hint = f"{command} --help lists what there is" if shown.exit_code == _USAGE else f"{command} -v tells more"
    _tell(shown.what, shown.where or command, shown.todo or hint)
    return shown.exit_code


def _as_slim_error(error: BaseException, arguments: Sequence[str]) -> SlimError:
    from onnxslim_llm.artifact.resources import as_resource_error
    from onnxslim_llm.errors import CompilerBug

    if isinstance(error, SlimError):
        return error
    if isinstance(error, OSError | MemoryError):
        return as_resource_error(error)
    place = _place(error.__traceback__)
    command = " ".join([PROGRAM, *(a for a in arguments if a not in _VERBOSE), "-v"])
    return CompilerBug(
        f"this is a bug: {type(error).__name__}: {error}".splitlines()[0],
        where=place,
        todo=f"report it with the output of: {command}",
    )


def _place(tb: TracebackType | None) -> str:
    """The innermost line of our own code, and the pass that was running."""
    place, running = "", ""
    while tb is not None:
        code = tb.tb_frame.f_code
        module = tb.tb_frame.f_globals.get("__name__", "")
        if module.startswith("onnxslim_llm"):
            place = f"{module}:{tb.tb_lineno} in {code.co_name}"
        owner = tb.tb_frame.f_locals.get("self")
        if isinstance(name := getattr(owner, "name", None), str) and hasattr(owner, "apply"):
            running = f"pass '{name}', "
        tb = tb.tb_next
    return running + place


def _usage(error: click.ClickException, arguments: Sequence[str]) -> tuple[str, str, str]:
    from onnxslim_llm.cli.app import VERBS

    context = getattr(error, "ctx", None)
    # An option without its argument is told without a context.
    where = context.command_path if context else " ".join([PROGRAM, *(a for a in arguments[:1] if a in VERBS)])
    hints = getattr(error, "possibilities", None)
    # With hints format_message() would tell them in the same line.
    what = (error.message if hints else error.format_message()).rstrip(".")
    todo = f"{where} --help lists what there is"
    if hints:
        todo = "did you mean " + " or ".join(f"'{hint}'" for hint in hints) + "?"
    return what[:1].lower() + what[1:], where, todo


def _tell(what: str, where: str, todo: str) -> None:
    click.echo(click.style("error: ", fg="red", bold=True) + what, err=True)
    if where:
        click.echo(click.style("  where: ", dim=True) + where, err=True)
    if todo:
        click.echo(click.style("  to do: ", dim=True) + todo, err=True)
