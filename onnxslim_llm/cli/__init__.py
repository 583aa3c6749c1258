"""The command line: one file a verb, each of which parses, calls the API and prints."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of the console script; ends the process with the contract's exit codes."""
    _open_closed_streams()
    from onnxslim_llm.cli.run import INTERRUPTED, run

    code = run(sys.argv[1:])
    if code == INTERRUPTED:
        # CPython remembers a KeyboardInterrupt that passed through code made from text (every dataclass has some) even
        # after it was caught, and would end the process by the signal instead of with the contract's code.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _open_closed_streams() -> None:
    """Open /dev/null for the standard streams that the parent closed, or the next file would get their number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
