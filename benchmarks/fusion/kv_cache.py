"""What the kinds of KV cache cost: time of a decode step and bytes of the cache, at several lengths.

    python benchmarks/fusion/kv_cache.py [--preset 125m] [--lengths 512 2048] [--steps 30]

A random decoder is compiled three times (`--kv-cache separate`, `shared`, `int8`), and the artifacts take turns.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median

import numpy as np

import onnxslim_llm as osl

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reference_decoder import PRESETS, write

from onnxslim_llm.runtime.decoder import DecoderRunner, DecoderState
from onnxslim_llm.runtime.session import open_session

KINDS = ("separate", "shared", "int8")
_CHUNK = 256


def main() -> None:
    """Compile, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="125m")
    parser.add_argument("--recipe", default="safe")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.onnx"
        write(PRESETS[options.preset], source)
        runners = {}
        for kind in KINDS:
            out = Path(folder) / kind
            osl.compile(source, out, recipe=options.recipe, target="ort-cpu", kv_cache=kind, verify="off")
            runners[kind] = DecoderRunner(open_session(out / "model.onnx", threads=options.threads))
        print(f"{options.preset}, {options.threads} threads, {date.today()}: ms a step (median), MB of cache")
        for length in options.lengths:
            row = _measure(runners, length, options.steps)
            cells = [f"{kind} {time_ * 1e3:.1f} ms {size / 1e6:.1f} MB" for kind, (time_, size) in row.items()]
            print(f"T = {length}: " + " | ".join(cells))


def _measure(runners: dict[str, DecoderRunner], length: int, steps: int) -> dict[str, tuple[float, int]]:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 1000, (1, length - steps))
    states: dict[str, DecoderState] = {}
    times: dict[str, list[float]] = {kind: [] for kind in runners}
    for kind, runner in runners.items():
        _, states[kind] = runner.prefill(ids, chunk=_CHUNK)
    for _ in range(steps):
        token = rng.integers(0, 1000, (1, 1))
        for kind, runner in runners.items():
            start = time.perf_counter()
            _, states[kind] = runner.extend(token, states[kind])
            times[kind].append(time.perf_counter() - start)
    return {kind: (median(times[kind]), _cache_bytes(states[kind])) for kind in runners}


def _cache_bytes(state: DecoderState) -> int:
    values = state.buffers.values if state.buffers is not None else state.caches
    return sum(value.tensor_size_in_bytes() for value in values.values())


if __name__ == "__main__":
    main()
