"""Where a compiled decoder's time goes: ONNX Runtime's profile of a prompt and of single steps, by operator.

    python benchmarks/end_to_end/operators.py models/llama-3.2-1b/ort-cpu-ops/model.onnx --threads 1

Least of several runs, in milliseconds; the product that makes the logits is a line of its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from onnxslim_llm.custom_ops import ops
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.session import Session

PROMPT_RUNS, STEPS, PROMPT_BEFORE_STEPS = 4, 12, 128


def profile(model: Path, threads: int, tokens: int, folder: Path) -> list[dict[str, Any]]:
    """Events of `PROMPT_RUNS` prompts of `tokens` tokens, a shorter prompt and `STEPS` steps."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    ops.register(options)
    inference = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    runner = DecoderRunner(Session(inference, str(model)))
    ids = np.random.default_rng(0).integers(0, runner.vocab, (1, max(tokens, PROMPT_BEFORE_STEPS)))
    for _ in range(PROMPT_RUNS):
        runner.prefill(ids[:, :tokens])
    logits, state = runner.prefill(ids[:, :PROMPT_BEFORE_STEPS])
    for _ in range(STEPS):
        logits, state = runner.extend(logits[:, -1].argmax(axis=-1)[:, None], state)
    events: list[dict[str, Any]] = json.loads(Path(inference.end_profiling()).read_text(encoding="utf-8"))
    return events


def by_operator(events: list[dict[str, Any]], first: int, last: int) -> dict[str, float]:
    """Milliseconds of each operator, and of "all", in the fastest of the runs `first` up to `last` (not included)."""
    runs = [event for event in events if event["name"] == "model_run"][first:last]
    nodes = [event for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")]
    last_product = nodes[-1]["name"] if nodes else ""
    totals = []
    for run in runs:
        total: Counter[str] = Counter()
        for node in nodes:
            if run["ts"] <= node["ts"] < run["ts"] + run["dur"]:
                kind = node["args"]["op_name"]
                total[f"{kind} (logits)" if node["name"] == last_product else kind] += node["dur"]
        total["all"] = run["dur"]
        totals.append(total)
    best = min(totals, key=lambda total: total["all"])
    return {name: micro / 1e3 for name, micro in best.most_common()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prefill", type=int, default=256)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        events = profile(arguments.model, arguments.threads, arguments.prefill, Path(folder))
    # The first runs of either kind warm up, and the prompt before the steps is neither.
    runs = sum(event["name"] == "model_run" for event in events)
    parts = {
        f"prompt of {arguments.prefill} tokens": (runs - STEPS - PROMPT_RUNS, runs - STEPS - 1),
        "one step": (runs - STEPS + 1, runs),
    }
    for title, (first, last) in parts.items():
        print(f"{title}:")
        for name, milli in by_operator(events, first, last).items():
            if milli >= 0.01:
                print(f"  {name:40} {milli:10.2f} ms")


if __name__ == "__main__":
    main()
