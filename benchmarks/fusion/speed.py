"""What fusion buys: decode and prefill of a random 100 M-parameter Llama, against the source and the peers' outputs.

    python benchmarks/fusion/speed.py [--folder DIR] [--layers 12] [--rounds 15] [--threads 1]

The source is exported by Optimum (TorchScript, KV cache). Every graph runs in ONNX Runtime with all of its own
optimisations; one step of each graph in turn, so that a machine that slows down does so for all; medians, and their
ratio to the source's. Decode is one token on a cache of 512 tokens, prefill 256 tokens on an empty one, batch 1. Peers
that are not installed are left out. Needs the extra `hf`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

CACHE, PROMPT = 512, 256


def export(folder: Path, layers: int) -> Path:
    """Export a random Llama of 12 heads of 64 (4 of keys and values), unless it is there already."""
    out = folder / "source" / "model.onnx"
    if out.exists():
        return out
    import torch
    from optimum.exporters.onnx import onnx_export_from_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    onnx_export_from_model(
        LlamaForCausalLM(config).eval(), out.parent, task="text-generation-with-past", do_validation=False
    )
    return out


def ours(target: str) -> Callable[[Path, Path], None]:
    """Compile with the recipe that changes no number."""

    def build(source: Path, out: Path) -> None:
        from onnxslim_llm import compile as compile_model

        compile_model(source, out.parent, target=target, recipe="safe", verify="off", force=True)

    return build


def with_onnxslim(source: Path, out: Path) -> None:
    """Run OnnxSlim with its defaults."""
    import onnxslim

    onnxslim.slim(str(source), str(out))


def with_onnxscript(source: Path, out: Path) -> None:
    """Run onnxscript's general optimizer and its fusions for ONNX Runtime."""
    import onnx_ir
    from onnxscript.optimizer import optimize
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    model = onnx_ir.load(source)
    optimize(model)
    result = optimize_for_ort(model)
    onnx_ir.save(result[0] if isinstance(result, tuple) else result, out)


def with_transformers(model_type: str) -> Callable[[Path, Path], None]:
    """Run onnxruntime.transformers.optimizer as a model type that it knows (Llama is not among them)."""

    def build(source: Path, out: Path) -> None:
        from onnxruntime.transformers.optimizer import optimize_model

        optimized = optimize_model(str(source), model_type=model_type, num_heads=12, hidden_size=768, opt_level=0)
        optimized.save_model_to_file(str(out))

    return build


BUILDERS: dict[str, Callable[[Path, Path], None]] = {
    "ours, ort-cpu": ours("ort-cpu"),
    "ours, portable": ours("portable"),
    "onnxslim": with_onnxslim,
    "onnxscript": with_onnxscript,
    "ort.transformers gpt2": with_transformers("gpt2"),
    "ort.transformers bert": with_transformers("bert"),
    "ort.transformers qwen3": with_transformers("qwen3"),
}


class Runner:
    """One graph in ONNX Runtime."""

    def __init__(self, path: Path, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def feeds(self, new: int, past: int) -> dict[str, np.ndarray[Any, Any]]:
        """Return inputs of the same content for every graph: `new` tokens on a cache of `past`."""
        rng = np.random.default_rng(0)
        made: dict[str, np.ndarray[Any, Any]] = {}
        for info in self.session.get_inputs():
            if info.name == "input_ids":
                made[info.name] = rng.integers(0, 16384, (1, new))
            elif info.name == "attention_mask":
                made[info.name] = np.ones((1, past + new), np.int64)
            elif info.name == "position_ids":
                made[info.name] = np.arange(past, past + new)[None]
            else:
                made[info.name] = rng.standard_normal((1, 4, past, 64)).astype(np.float32)
        return made


def measure(runners: dict[str, Runner], new: int, past: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return medians in microseconds, the ratio to the source, and the largest difference of the logits."""
    feeds = {name: runner.feeds(new, past) for name, runner in runners.items()}
    reference = runners["source"].session.run(["logits"], feeds["source"])[0]
    samples: dict[str, list[float]] = {name: [] for name in runners}
    delta = {}
    for name, runner in runners.items():
        delta[name] = float(np.abs(runner.session.run(["logits"], feeds[name])[0] - reference).max())
    for _ in range(rounds):
        for name, runner in runners.items():
            start = time.perf_counter()
            runner.session.run(None, feeds[name])
            samples[name].append(1e6 * (time.perf_counter() - start))
    medians = {name: statistics.median(taken) for name, taken in samples.items()}
    return {
        name: {"us": round(median), "speedup": round(medians["source"] / median, 3), "max_delta": delta[name]}
        for name, median in medians.items()
    }


def main() -> None:
    """Print the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where exports are kept; default: a temporary folder")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        source = export(folder, arguments.layers)
        paths, failed = {"source": source}, {}
        for name, build in BUILDERS.items():
            out = folder / name.replace(" ", "-").replace(",", "") / "model.onnx"
            out.parent.mkdir(parents=True, exist_ok=True)
            try:
                build(source, out)
                paths[name] = out
            except Exception as error:  # whatever a peer may raise is its result
                failed[name] = f"{type(error).__name__}: {error}"[:200]
        runners = {name: Runner(path, arguments.threads) for name, path in paths.items()}
        nodes = {name: len(onnx.load(path, load_external_data=False).graph.node) for name, path in paths.items()}
        result = {
            "threads": arguments.threads,
            "nodes": nodes,
            "decode": measure(runners, 1, CACHE, arguments.rounds),
            "prefill": measure(runners, PROMPT, 0, max(3, arguments.rounds // 3)),
            "failed": failed,
        }
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
