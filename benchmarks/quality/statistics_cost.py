"""What collecting statistics costs: time next to a plain forward pass over the same tokens, and memory by their number.

    python benchmarks/quality/statistics_cost.py [--model MODEL.onnx] [--text TEXT] [--tokens 32768] [--repeats 3]

Time: both in one process, in turn, with the same number of threads (of ONNX Runtime and of numpy's BLAS); medians of
wall-clock and of processor seconds, and their ratios. Memory: the peak of a
process that collects from a few tokens and of one that collects from many, interpreter and libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.session import open_session
from onnxslim_llm.runtime.tokenizer import load_tokenizer
from onnxslim_llm.stats.calibration import TokenCalibration
from onnxslim_llm.stats.collect import collect

SAMPLE = Path(__file__).resolve().parents[2] / "models" / "stdlib-llama"
FEW, MANY = 4096, 65_536
WINDOW = 512


@dataclass(frozen=True)
class Times:
    """Seconds on the wall clock, and of all processors together."""

    wall: float
    processor: float

    @classmethod
    def now(cls) -> Times:
        """What the clocks say."""
        return cls(time.perf_counter(), time.process_time())

    def until_now(self) -> Times:
        """What has passed since."""
        now = self.now()
        return Times(now.wall - self.wall, now.processor - self.processor)


def calibration(model: Path, text: Path, tokens: int) -> TokenCalibration:
    """The first tokens of a text; a short text begins anew."""
    ids = np.asarray(load_tokenizer(model.parent).encode(text.read_text(encoding="utf-8")), np.int64)
    runner = DecoderRunner(open_session(model, threads=1))
    return TokenCalibration.checked(np.resize(ids, tokens), WINDOW, runner.vocab, runner.arrays)


def collected(model: Path, data: TokenCalibration, threads: int) -> Times:
    """Time one collection."""
    with tempfile.TemporaryDirectory() as folder:
        start = Times.now()
        collect(model, "model", data, Path(folder), threads=threads)
        return start.until_now()


def forward(model: Path, data: TokenCalibration, threads: int) -> Times:
    """Time one pass over the same samples, the model's own outputs only."""
    session = open_session(model, threads=threads)
    start = Times.now()
    for feeds in data.feeds():
        session.run(feeds)
    return start.until_now()


def child(args: argparse.Namespace, tokens: int, repeats: int) -> dict[str, Any]:
    """Measure in a process of its own, whose BLAS has `args.threads` threads."""
    given = ["--model", str(args.model), "--text", str(args.text), "--threads", str(args.threads)]
    command = [sys.executable, __file__, *given, "--repeats", str(repeats), "--child", str(tokens)]
    threads = {f"{name}_NUM_THREADS": str(args.threads) for name in ("OPENBLAS", "OMP", "MKL")}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, **threads})
    return dict(json.loads(done.stdout))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """What a child does: with repeats both times, without only the memory of one collection."""
    data = calibration(args.model, args.text, args.child)
    if not args.repeats:
        collected(args.model, data, args.threads)
        return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    pairs = [
        (forward(args.model, data, args.threads), collected(args.model, data, args.threads))
        for _ in range(args.repeats)
    ]
    return {
        clock: [statistics.median(getattr(times, clock) for times in each) for each in zip(*pairs, strict=True)]
        for clock in ("wall", "processor")
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SAMPLE / "model.onnx")
    parser.add_argument("--text", type=Path, default=SAMPLE / "heldout.txt")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
        return
    for clock, (plain, ours) in child(args, args.tokens, args.repeats).items():
        line = f"{args.tokens} tokens, {clock}: forward {plain:.1f} s, statistics {ours:.1f} s"
        print(f"{line}, {ours / plain:.2f} times as long")
    few, many = (child(args, tokens, 0)["peak"] for tokens in (FEW, MANY))
    print(f"peak memory: {FEW} tokens {few / 1e6:.0f} MB, {MANY} tokens {many / 1e6:.0f} MB, {many / few:.2f} times")


if __name__ == "__main__":
    main()
