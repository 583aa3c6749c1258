"""Does packing projections pay? Decode and prefill of a random decoder, with and without pack_projections, by turns.

    python benchmarks/packing/projections.py [--hidden 768] [--layers 8] [--threads 2] [--rounds 15]

Prints the ratio of medians (above 1: packed is faster) for float32 and few-bit weights on ONNX Runtime's CPU kernels.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from reference_decoder import DecoderSpec, write

from onnxslim_llm.ir.model import open_model
from onnxslim_llm.ir.save import save_model
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.session import open_session

PAST = 256
PROMPTS = (16, 256)


def prepare(source: Path, folder: Path, passes: str, threads: int) -> DecoderRunner:
    """Save `source` after the passes and open it."""
    model = open_model(source)
    Pipeline(passes).run(model)
    save_model(model, folder / "model.onnx")
    return DecoderRunner(open_session(folder / "model.onnx", threads=threads))


def seconds(runner: DecoderRunner, ids: np.ndarray, state: object) -> float:
    """Time of one run."""
    start = time.perf_counter()
    runner.extend(ids, state)  # type: ignore[arg-type]
    return time.perf_counter() - start


def compare(pair: tuple[DecoderRunner, DecoderRunner], rounds: int) -> None:
    """Print one line for decode and one for each prompt."""
    ids = np.random.default_rng(0).integers(0, pair[0].vocab, (1, PAST))
    states = [runner.extend(ids)[1] for runner in pair]
    cases = [("decode", ids[:, :1], states, 16), *((f"prefill {n}", ids[:, :n], [None, None], 1) for n in PROMPTS)]
    for name, fed, before, repeat in cases:
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for i, runner in enumerate(pair):
                times[i].append(sum(seconds(runner, fed, before[i]) for _ in range(repeat)) / repeat)
        plain, packed = (statistics.median(t) for t in times)
        print(f"  {name:12s} {1e3 * plain:8.2f} ms -> {1e3 * packed:8.2f} ms   x {plain / packed:.2f}", flush=True)


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    for option, default in (("hidden", 768), ("layers", 8), ("threads", 2), ("rounds", 15), ("kv_heads", 4)):
        parser.add_argument(f"--{option}", type=int, default=default)
    options = parser.parse_args()
    spec = DecoderSpec(
        vocab=2048,
        hidden=options.hidden,
        layers=options.layers,
        heads=options.hidden // 64,
        kv_heads=options.kv_heads,
        head_dim=64,
        ffn=options.hidden * 8 // 3 // 64 * 64,
    )
    kinds = {"float32": "cleanup", "4 bits": "cleanup, quantize_weights{sensitive_bits=4, method=rtn}"}
    with tempfile.TemporaryDirectory() as scratch:
        source = write(spec, Path(scratch) / "source.onnx")
        for kind, passes in kinds.items():
            runners = []
            for step in ("", ", pack_projections"):
                folder = Path(scratch) / f"{kind}{step}"
                folder.mkdir()
                runners.append(prepare(source, folder, f"{passes}{step}, lower_ort_cpu", options.threads))
            print(kind)
            compare((runners[0], runners[1]), options.rounds)


if __name__ == "__main__":
    main()
