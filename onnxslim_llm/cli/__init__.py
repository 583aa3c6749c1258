"""The command line: one file a verb, each of which parses, calls the API and prints."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of the console script; ends the process with the contract's exit codes."""
    from onnxslim_llm.cli.run import run

    sys.exit(run(sys.argv[1:]))
