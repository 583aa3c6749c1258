"""Peak memory of calibrating the sample model with few and with many samples, for every calibrator.

    python benchmarks/qdq/memory.py [--few 10] [--many 1000] [--length 32]

Each measurement is a process of its own, whose peak resident memory is read when it ends. All inputs and results of the
fused model's products are observed, at once. Exits with 1 if a calibrator with many samples takes more than 1.2 times
the memory of the same one with few.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "models" / "stdlib-llama"
LIMIT = 1.2


def observe(calibrator: str, samples: int, length: int) -> int:
    """Calibrate, and return the number of observed tensors."""
    from onnxslim_llm.compiler.lowering import in_order, intake_passes, lowering_passes
    from onnxslim_llm.ir.model import open_model
    from onnxslim_llm.recipe import Recipe
    from onnxslim_llm.rewrite.context import Context
    from onnxslim_llm.rewrite.pipeline import Pipeline
    from onnxslim_llm.runtime.decoder import DecoderRunner
    from onnxslim_llm.runtime.session import Session
    from onnxslim_llm.stats.grid import grid_of
    from onnxslim_llm.stats.observe import GraphObserver
    from onnxslim_llm.stats.ranges import make_collector
    from onnxslim_llm.targets import get_target

    target = get_target("ort-cpu")
    model = open_model(SAMPLE / "model.onnx")
    passes = in_order(Recipe.load("safe").build(), lowering_passes(target, "separate", None))
    Pipeline([*intake_passes(target), *passes]).run(model, Context(target=target))
    products = [node for node in model.graph.nodes if node.op == "MatMul"]
    tensors = dict.fromkeys(t.name for node in products for t in (node.inputs[0], node.outputs[0]))
    collectors = {name: make_collector(calibrator) for name in tensors}  # type: ignore[arg-type]

    def feeds(session: Session) -> Iterator[dict[str, Any]]:
        runner = DecoderRunner(session)
        rng = np.random.default_rng(0)
        for _ in range(samples):
            yield runner.arrays(rng.integers(0, runner.vocab, (1, length)))

    GraphObserver(feeds, threads=1).observe(model, collectors)
    for collector in collectors.values():
        collector.range(grid_of("uint8", False))
    return len(collectors)


def peak_mib(calibrator: str, samples: int, length: int) -> float:
    """Return the peak resident memory, in MiB, of a process that calibrates."""
    command = [sys.executable, __file__, "--one", calibrator, str(samples), str(length)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return float(done.stdout.split()[-1])


def main() -> int:
    """Measure all calibrators and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--few", type=int, default=10)
    parser.add_argument("--many", type=int, default=1000)
    parser.add_argument("--length", type=int, default=32, help="tokens of a sample")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.one:
        observe(args.one[0], int(args.one[1]), int(args.one[2]))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return 0
    from onnxslim_llm.stats.ranges import CALIBRATORS

    print(f"| calibrator | {args.few} samples | {args.many} samples | ratio |")
    print("|---|---|---|---|")
    worst = 0.0
    for calibrator in CALIBRATORS:
        few, many = (peak_mib(calibrator, samples, args.length) for samples in (args.few, args.many))
        worst = max(worst, many / few)
        print(f"| {calibrator} | {few:.0f} MiB | {many:.0f} MiB | {many / few:.2f} |", flush=True)
    return int(worst > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
