"""Time of the cleanup of a decoder graph as TorchScript exports it: `python benchmarks/cleanup/speed.py [MODEL]`.

Without a MODEL, a decoder of about 2,000 nodes is generated. Opening and saving are timed apart.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import onnx
from torchscript_decoder import Sizes, build

from onnxslim_llm.ir.model import open_model
from onnxslim_llm.ir.save import SaveOptions, save_model
from onnxslim_llm.rewrite.pipeline import Pipeline

#: What the project promises for such a graph, in seconds.
LIMIT_SECONDS = 3.0


def main() -> None:
    """Print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.model
        if path is None:
            path = Path(folder) / "model.onnx"
            onnx.save(build(Sizes(layers=options.layers, hidden=64, ffn=128, vocab=512)), path)
        timings = [_once(path, Path(folder) / f"out{run}.onnx") for run in range(options.runs)]
    opened, cleaned, saved = (statistics.median(column) for column in list(zip(*timings, strict=True))[:3])
    before, after, rounds, seconds = timings[-1][3:]
    print(f"nodes {before} -> {after} in {rounds} rounds")
    print(f"open {opened:.3f} s, cleanup {cleaned:.3f} s (limit {LIMIT_SECONDS} s), save {saved:.3f} s; medians")
    for name, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"  {name:32} {spent:.3f} s")


def _once(path: Path, out: Path) -> tuple[float, float, float, int, int, int, dict[str, float]]:
    start = time.perf_counter()
    model = open_model(path)
    opened = time.perf_counter()
    record = Pipeline("cleanup").run(model)[0]
    cleaned = time.perf_counter()
    save_model(model, out, SaveOptions(jobs=1))
    saved = time.perf_counter()
    times = (opened - start, cleaned - opened, saved - cleaned)
    return (*times, *record.nodes, record.detail["rounds"], record.detail["seconds"])


if __name__ == "__main__":
    main()
