"""Whole decoders, attention and cache included: our operators, ONNX Runtime's MatMulNBits, and llama.cpp's Q4_0.

    python benchmarks/end_to_end/compare.py --folder models --shapes tinyllama-1.1b,llama-3.2-1b --out end_to_end.jsonl

Writes random decoders of published sizes (once; some 6 GB each), compiles them, and measures prefill and decode, each
contestant in a process of its own that waits while others run. Ratios are of medians of interleaved rounds; a round has
one prompt and one short generation of every contestant. Weights take 4 bits and a scale for 32 everywhere, embedding
and classifier included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from shapes import COMPILED, LLAMA, SHAPES, prepare
from summary import Result, table

HERE = Path(__file__).resolve().parent


class Process:
    """A contestant that answers one request at a time."""

    def __init__(self, model: Path, threads: int) -> None:
        self._opening = {"model": str(model), "threads": threads}
        root = str(HERE.parents[1])
        paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, verb: str, **request: int | str) -> dict[str, Any]:
        """Send a request, wait for the answer."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps({**self._opening, "verb": verb, **request}) + "\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise SystemExit(f"{self._opening['model']}: the process ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def measure(models: dict[str, Path], threads: int, arguments: argparse.Namespace, shape: str) -> list[Result]:
    """All contestants for one shape and number of threads."""
    samples: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(Process(path, threads)) for name, path in models.items()}
        loads = {name: process.ask("load") for name, process in processes.items()}
        for round_number in range(arguments.rounds + 1):
            for name, process in processes.items():
                prefill = process.ask("prefill", tokens=arguments.prefill, clock=arguments.clock)["seconds"]
                request = {"prompt": arguments.prompt, "tokens": arguments.tokens, "clock": arguments.clock}
                steps = process.ask("decode", **request)["steps"]
                if round_number:  # the first one warms up
                    samples[name]["prefill"].append(prefill)
                    samples[name]["decode"] += steps
        memory = {name: process.ask("memory") for name, process in processes.items()}
    return [
        Result(
            shape=shape,
            threads=threads,
            name=name,
            load_seconds=loads[name]["seconds"],
            load_anonymous=loads[name]["anonymous"],
            anonymous=memory[name]["anonymous"],
            prefill_seconds=statistics.median(taken["prefill"]),
            prefill_tokens=arguments.prefill,
            step_seconds=statistics.median(taken["decode"]),
            best_prefill_seconds=min(taken["prefill"]),
            best_step_seconds=min(taken["decode"]),
        )
        for name, taken in samples.items()
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/end-to-end"), help="for the models")
    parser.add_argument("--shapes", default="tinyllama-1.1b,llama-3.2-1b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--contestants", default=",".join([*COMPILED, LLAMA]))
    parser.add_argument("--prefill", type=int, default=256, help="tokens of the prompt that is timed")
    parser.add_argument("--prompt", type=int, default=128, help="tokens before those that are decoded")
    parser.add_argument("--tokens", type=int, default=32, help="tokens that are decoded in a round")
    parser.add_argument("--rounds", type=int, default=7, help="behind one that warms up")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time, which for one thread says more where others use the machine",
    )
    parser.add_argument("--out", type=Path, help="file that lines of JSON are added to")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="print the table of an --out file, and end")
    arguments = parser.parse_args()
    if arguments.markdown is not None:
        lines = arguments.markdown.read_text(encoding="utf-8").splitlines()
        print(table([Result(**json.loads(line)) for line in lines]))
        return
    if arguments.clock == "cpu" and arguments.threads != "1":
        parser.error("processor time of several threads says nothing: --threads 1")
    names = arguments.contestants.split(",")
    if LLAMA in names:
        try:
            import gguf  # noqa: F401
            import llama_cpp  # noqa: F401
        except ImportError as error:
            print(f"llama.cpp is left out ({error}): pip install gguf llama-cpp-python")
            names.remove(LLAMA)
    results: list[Result] = []
    for shape in arguments.shapes.split(","):
        models = prepare(shape, arguments.folder / shape, names)
        for threads in map(int, arguments.threads.split(",")):
            found = measure(models, threads, arguments, shape)
            results += found
            if arguments.out is not None:
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.writelines(result.to_json() + "\n" for result in found)
            print(table(found), flush=True)
    if len(results) > len(names):
        print("\n" + table(results))


if __name__ == "__main__":
    main()
