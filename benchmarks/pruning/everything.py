"""All tables of docs/pruning.md by one command: masks, low rank, structure, and what says nothing.

    python benchmarks/pruning/everything.py [--data FOLDER]     # FOLDER: the story models; then MiniLM is measured, too

Takes some hours on two cores. Each script can be run by itself, for some models or rows; their docstrings say how.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
#: Script and its own arguments; whether it measures the story models and MiniLM.
SCRIPTS: tuple[tuple[tuple[str, ...], bool], ...] = (
    (("table.py", "--write"), True),
    (("low_rank.py", "--write"), True),
    (("structural.py", "accuracy", "--write"), False),
    (("structural.py", "speed", "--write"), False),
    (("left_out.py",), True),
)


def main() -> None:
    """Run the scripts one after the other; the first that fails ends it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the story models")
    args = parser.parse_args()
    for (script, *options), takes_data in SCRIPTS:
        data = ["--data", str(args.data)] if args.data and takes_data else []
        subprocess.run([sys.executable, str(HERE / script), *options, *data], check=True)


if __name__ == "__main__":
    main()
