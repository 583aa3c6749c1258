"""Bits shared out by time: what was predicted, what a profile of decoding says, and what it is worth beside bytes.

A first compile times every form and takes the best ones. Then the model is compiled for shares of the time that these
take, and for bits per weight alone; of the latter, the best one that is as fast by the same times stands beside each of
the former. Products are timed in the whole model, too: the sum of their nodes in the profile of a decode step.

    python benchmarks/quality/by_time.py                                      # the sample model
    python benchmarks/quality/by_time.py --random --layers 2 --widths 3 4 8   # layers with the shapes of TinyLlama
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

import onnxslim_llm as osl
from onnxslim_llm.artifact.environment import usable_cpus
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.session import Session, open_session
from onnxslim_llm.runtime.tokenizer import load_tokenizer
from onnxslim_llm.targets import get_target
from onnxslim_llm.verify.quality import evaluate

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from reference_decoder import DecoderSpec, write  # noqa: E402  (a neighbour, not a package)

SAMPLE = ROOT / "models" / "stdlib-llama"
#: Nodes that read coded weights, on any target: portable ones are MatMulNBits in the session.
PRODUCTS = ("MatMulPacked", "GatherPacked", "MatMulNBits", "GatherBlockQuantized")
#: Decode steps that are profiled and timed, after a prompt, and how often.
STEPS, PROMPT, ROUNDS = 64, 16, 8
PERCENTILE = 10
#: As deployed, see `bench`.
DEPLOYED = {"session.intra_op.allow_spinning": "1"}
NO_LIMIT_MS = 1e6


@dataclass(frozen=True)
class Row:
    """One artifact; times in milliseconds a token.

    Attributes:
        asked: What was asked for.
        bits: Bits per weight that came of it.
        expected: Time of products by the measured table.
        profiled: By the profile.
        step: Time of the whole decode step.
        kl: Mean KL divergence from the source, nats; None where there is no text.
    """

    asked: str
    bits: float
    expected: float
    profiled: float
    step: float
    kl: float | None


def _compile(model: Path, out: Path, args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Compile and return what quantize_weights says."""
    common = {"widths": list(args.widths)} if args.widths else {}
    if args.random:
        common |= {"method": "rtn"}
    assigned = [f"quantize_weights.{name}={json.dumps(value)}" for name, value in (common | settings).items()]
    result = osl.compile(
        model,
        out,
        target=args.target,
        recipe="int4-fast" if args.random else "int4-calibrated",
        settings=assigned,
        calib=None if args.random else SAMPLE / "calib.txt",
        statistics=args.statistics or args.work / "statistics",
        jobs=args.threads,
        verify="off",
        force=True,
    )
    detail: dict[str, Any] = next(p.detail for p in result.manifest.passes if p.name == "quantize_weights")
    return detail


def _profiled(path: Path, target_name: str, threads: int) -> tuple[float, float]:
    """Return the milliseconds of products in a decode step, and those of the fastest whole step."""
    target = get_target(target_name)
    runner = DecoderRunner(open_session(path, threads=threads, config={**target.session_config, **DEPLOYED}))
    whole = min(seconds for _ in range(ROUNDS) for seconds in _steps(runner))
    del runner
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.log_severity_level = 4
        for key, value in {**target.session_config, **DEPLOYED}.items():
            options.add_session_config_entry(key, value)
        if target.needs_operators:
            osl.register_custom_ops(options)
        inference = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        runner = DecoderRunner(Session(inference))
        for _ in range(ROUNDS):
            _steps(runner)
        events = json.loads(Path(inference.end_profiling()).read_text())
    return _products(events) / 1e3, whole * 1e3


def _steps(runner: DecoderRunner) -> list[float]:
    """Return the seconds of each decode step."""
    ids = np.random.default_rng(0).integers(0, runner.vocab, (1, PROMPT))
    logits, state = runner.prefill(ids)
    seconds = []
    for _ in range(STEPS):
        token = logits[:, -1].argmax(axis=-1)[:, None]
        start = time.perf_counter()
        logits, state = runner.extend(token, state)
        seconds.append(time.perf_counter() - start)
    return seconds


def _products(events: Sequence[dict[str, Any]]) -> float:
    """Return the microseconds of products in a decode step: of each node a low percentile, for other work only adds."""
    found: dict[str, list[float]] = {}
    for event in events:
        name = event.get("name", "")
        if name.endswith("_kernel_time") and event["args"]["op_name"] in PRODUCTS:
            found.setdefault(name, []).append(event["dur"])
    return float(sum(np.percentile(times, PERCENTILE) for times in found.values()))


def _row(asked: str, detail: dict[str, Any], artifact: Path, model: Path, args: argparse.Namespace) -> Row:
    products, step = _profiled(artifact / "model.onnx", args.target, args.threads)
    kl = None
    if not args.random:
        quality = evaluate(
            get_target(args.target).open(artifact / "model.onnx", threads=args.threads),
            SAMPLE / "heldout.txt",
            load_tokenizer(SAMPLE),
            versus=open_session(model, threads=args.threads),
            max_tokens=args.tokens,
            threads=args.threads,
        )
        assert quality.difference is not None
        kl = quality.difference.kld_mean
    return Row(asked, detail["bits_per_weight"], detail["expected_ms"], products, step, kl)


def _print(row: Row) -> None:
    off = 100 * (row.profiled / row.expected - 1)
    kl = "" if row.kl is None else f"{row.kl:.4f}"
    cells = (f"{row.bits:.2f}", f"{row.expected:.3f}", f"{row.profiled:.3f} ({off:+.0f} %)", f"{row.step:.3f}", kl)
    print(f"| {row.asked} | {' | '.join(cells)} |", flush=True)


def _ladder(model: Path, args: argparse.Namespace, times: str) -> list[tuple[float, dict[str, Any], Path]]:
    """Return artifacts by bytes alone, with the time that they are expected to take."""
    found = []
    for bits in args.bits:
        out = args.work / f"bits{bits:g}"
        found.append((bits, _compile(model, out, args, _timed(NO_LIMIT_MS, times) | {"target_bits": bits}), out))
    return found


def _timed(milliseconds: float, times: str = "") -> dict[str, Any]:
    return {"target_ms": milliseconds, "target_bits": 0} | ({"times": times} if times else {})


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="ort-cpu-ops")
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--shares", type=float, nargs="+", default=[0.65, 0.75, 0.9], help="of the best forms' time")
    parser.add_argument("--bits", type=float, nargs="*", default=[3.5, 4.0, 4.25, 4.5, 5.0, 6.0, 7.0, 8.1])
    parser.add_argument("--widths", type=int, nargs="*", help="default: all of the target")
    parser.add_argument("--statistics", type=Path, help="a folder that keeps calibration statistics")
    parser.add_argument("--random", action="store_true", help="a random decoder with the layers of TinyLlama 1.1B")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096, help="of the text that KL is measured on")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="by-time-") as folder:
        args.work = Path(folder)
        model = SAMPLE / "model.onnx"
        if args.random:
            sizes = {"hidden": 2048, "heads": 32, "kv_heads": 4, "head_dim": 64, "ffn": 5632, "vocab": 32000}
            model = write(DecoderSpec(layers=args.layers, **sizes), args.work / "decoder.onnx")
        best = _compile(model, args.work / "best", args, _timed(NO_LIMIT_MS))
        times = str(args.work / "best" / "manifest.json")
        print("| asked for | bits | products, expected ms | in the profile | whole step | KL |")
        print("|---|---:|---:|---:|---:|---:|")
        _print(_row("no limit", best, args.work / "best", model, args))
        ladder = [] if args.random else _ladder(model, args, times)
        for share in args.shares:
            limit = float(f"{share * best['expected_ms']:.3g}")
            out = args.work / f"share{share:g}"
            detail = _compile(model, out, args, _timed(limit, times))
            _print(_row(f"`target_ms={limit:g}`", detail, out, model, args))
            fast = [
                _row(f"`target_bits={bits:g}`, as fast", found, where, model, args)
                for bits, found, where in ladder
                if found["expected_ms"] <= limit
            ]
            if fast:
                _print(min(fast, key=lambda row: row.kl or 0.0))


if __name__ == "__main__":
    main()
