"""A real weight job for the tests: float32 to float16 by row tiles, with the rows' sums as a second output.

Run as a program it saves a model of one such job, for tests that need a process of their own:

    python ir_jobs.py SOURCE OUT --rows N --columns N [--jobs N] [--journal FILE] [--slow SECONDS] [--limit-file BYTES]

It prints the peak resident memory in bytes, mapped pages included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.save import SaveOptions, save_model
from onnxslim_llm.ir.weights import MappedFile, MappedWeight, Weight, constant
from onnxslim_llm.ir.weights.jobs import TensorSpec, Tile, TileOutput, WeightJob, derive

TILE_BYTES = 4 << 20


class HalveJob(WeightJob):
    """Outputs: 0 the rows as float16, 1 the sum of each row as float32, 2 one number that is always 7."""

    def __init__(self, source: Weight, name: str = "w", slow: float = 0.0) -> None:
        rows, columns = source.shape
        self.inputs = (source,)
        self.outputs = (
            TensorSpec((rows, columns), TensorProto.FLOAT16),
            TensorSpec((rows,), TensorProto.FLOAT),
            TensorSpec((1,), TensorProto.INT64),
        )
        self.fingerprint = "halve 1"
        self.name = name
        self.slow = slow
        self.runs = 0

    def tiles(self) -> Sequence[Tile]:
        rows, columns = self.inputs[0].shape
        step = max(1, TILE_BYTES // (4 * columns))
        return [Tile(start, min(rows, start + step), 6 * step * columns) for start in range(0, rows, step)]

    def run(self, tile: Tile) -> TileOutput:
        self.runs += 1
        part = self.inputs[0].view()[tile.start : tile.stop]
        time.sleep(self.slow)
        columns = part.shape[1]
        writes: list[tuple[int, int, Any]] = [
            (0, tile.start * columns * 2, np.ascontiguousarray(part, np.float16)),
            (1, tile.start * 4, part.sum(axis=1, dtype=np.float32)),
        ]
        if tile.start == 0:
            writes.append((2, 0, np.array([7], np.int64)))
        stats = {"sum": float(part.sum(dtype=np.float64)), "bad": float((~np.isfinite(part)).sum())}
        return TileOutput(writes, stats, [(0, tile.start * columns * 4, tile.stop * columns * 4)])

    def where(self) -> str:
        return self.name

    def finish(self, stats: list[dict[str, float]]) -> dict[str, Any]:
        total = super().finish(stats)
        if total["bad"]:
            raise ModelError(f"{int(total['bad'])} weights are no finite numbers", where=f"weight '{self.name}'")
        return total


class FileJournal:
    """A journal in a file, one JSON line an entry, statistics included."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.entries: dict[str, Any] = dict(json.loads(line) for line in lines)
        self.details: dict[str, Any] = {}

    def done(self, key: str) -> bool:
        return key in self.entries

    def mark(self, key: str) -> None:
        self.entries[key] = self.details.get(key)
        with self.path.open("a") as file:
            file.write(json.dumps([key, self.entries[key]]) + "\n")

    def note(self, key: str, detail: dict[str, Any]) -> None:
        self.details[key] = detail

    def detail(self, key: str) -> dict[str, Any] | None:
        entry: dict[str, Any] | None = self.entries.get(key)
        return entry


def model_of(*weights: Weight) -> Model:
    """Return a model whose outputs are these weights, called w0, w1, ..."""
    nodes, outputs = [], []
    for index, weight in enumerate(weights):
        out = gs.Variable(f"y{index}", weight.dtype, weight.shape)
        nodes.append(gs.Node("Identity", f"n{index}", inputs=[constant(f"w{index}", weight)], outputs=[out]))
        outputs.append(out)
    return Model(gs.Graph(nodes, [], outputs, opset=21))


def write_weights(path: Path, rows: int, columns: int, seed: int = 0) -> MappedWeight:
    """Write random float32 numbers, the same ones for the same seed, and map them."""
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        for start in range(0, rows, 1024):
            rng.standard_normal((min(1024, rows - start), columns), np.float32).tofile(file)
    return MappedWeight(MappedFile(path), 0, (rows, columns), TensorProto.FLOAT)


def halved_model(source: Path, count: int, rows: int, columns: int, slow: float = 0.0) -> Model:
    """Return a model of `count` jobs over consecutive weights of a file; their small third outputs are not used."""
    file = MappedFile(source)
    weights: list[Weight] = []
    for index in range(count):
        weight = MappedWeight(file, index * rows * columns * 4, (rows, columns), TensorProto.FLOAT)
        weights += derive(HalveJob(weight, f"weight{index}", slow))[:2]
    return model_of(*weights)


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--columns", type=int, required=True)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--limit-file", type=int)
    parser.add_argument("--kill-after", type=int, help="end by SIGKILL when so many units are marked")
    arguments = parser.parse_args()
    if arguments.limit_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (arguments.limit_file, arguments.limit_file))
    journal = FileJournal(arguments.journal) if arguments.journal else None
    if journal is not None and arguments.kill_after:
        mark = journal.mark

        def mark_and_die(key: str) -> None:
            mark(key)
            if len(journal.entries) >= arguments.kill_after:
                os.kill(os.getpid(), signal.SIGKILL)

        journal.mark = mark_and_die  # type: ignore[method-assign]
    model = halved_model(arguments.source, arguments.count, arguments.rows, arguments.columns, arguments.slow)
    before = peak_memory()
    print("ready", flush=True)
    report = save_model(model, arguments.out, SaveOptions(jobs=arguments.jobs), journal=journal)
    print(json.dumps({"before": before, "peak": peak_memory(), "resumed": report.resumed, "weights": report.weights}))


if __name__ == "__main__":
    main()
