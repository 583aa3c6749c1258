"""What pruning costs and saves: bytes, zeros, perplexity and KL divergence, one row for each list of passes.

Every row runs `cleanup`, the safe fusions and its own passes, lowers the model for a target, saves it and evaluates it
in the target's own runtime next to the source, on the same tokens.

    python benchmarks/pruning/table.py                                   # the sample model, the rows below
    python benchmarks/pruning/table.py --passes "prune_neurons{share=0.5}" --tokens 20000
    python benchmarks/pruning/table.py --markdown                        # the rows as a Markdown table
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxslim_llm.compiler.calibration import Calibrator
from onnxslim_llm.compiler.progress import Silent
from onnxslim_llm.ir.model import Model, open_model
from onnxslim_llm.ir.save import SaveOptions, save_model
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.recipe import Recipe
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.runtime.session import open_session
from onnxslim_llm.runtime.tokenizer import load_tokenizer
from onnxslim_llm.targets import get_target
from onnxslim_llm.verify.quality import evaluate

SAMPLE = Path(__file__).resolve().parents[2] / "models" / "stdlib-llama"

ROWS = (
    "prune_weights{method=magnitude}",
    "prune_weights{method=magnitude, refit=true}",
    "prune_weights{method=wanda, refit=false}",
    "prune_weights{method=wanda}",
    "prune_weights{method=sparsegpt, refit=false}",
    "prune_weights{method=sparsegpt}",
    "prune_weights{method=sparsegpt, allocation=outliers}",
    "prune_weights{method=sparsegpt, steps=4}",
    "prune_weights{method=magnitude, pattern='2:4'}",
    "prune_weights{method=wanda, pattern='2:4', refit=false}",
    "prune_weights{method=wanda, pattern='2:4'}",
    "prune_weights{method=sparsegpt, pattern='2:4', refit=false}",
    "prune_weights{method=sparsegpt, pattern='2:4'}",
    "prune_weights{method=sparsegpt, pattern='4:8'}",
    "prune_weights{method=sparsegpt, pattern='16x1'}",
    "prune_weights{sparsity=0.8, steps=4}, store_sparse",
    "prune_neurons{share=0.25, refit=false}",
    "prune_neurons{share=0.25}",
    "prune_neurons{share=0.5}",
)
HEAD = ("passes", "bytes", "ratio", "zeros", "perplexity", "KL", "KL p99", "top-1")


@dataclass(frozen=True)
class Row:
    """One list of passes.

    Attributes:
        passes: What ran.
        bytes: Size of the artifact, graph and weights.
        ratio: That, divided by the source's weights, each counted once.
        zeros: Share of zeros in the matrices of the artifact.
        ppl_ratio: Perplexity divided by the source's.
        kld_mean, kld_p99: KL(source || artifact) over tokens, in nats.
        top1: Share of tokens where both find the same token the likeliest.
    """

    passes: str
    bytes: int
    ratio: float
    zeros: float
    ppl_ratio: float
    kld_mean: float
    kld_p99: float
    top1: float

    def cells(self) -> list[str]:
        """Return the row as text."""
        figures = [f"{self.ratio:.3f}", f"{self.zeros:.3f}", f"{self.ppl_ratio:.3f}", f"{self.kld_mean:.4f}"]
        return [f"`{self.passes}`", f"{self.bytes:,}", *figures, f"{self.kld_p99:.3f}", f"{self.top1:.3f}"]


def measure(args: argparse.Namespace, passes: str, calibrator: Calibrator) -> Row:
    """Compile with one list of passes and compare with the source."""
    target = get_target(args.target)
    model = open_model(args.model)
    fusions = Pipeline(Recipe.load("safe").build())
    fusions.run(model, Context(target=target))
    distinct = model.weight_bytes()
    pipeline = Pipeline([*Pipeline(passes).passes, *Pipeline(target.lowering).passes])
    pipeline.run(model, Context(target=target, statistics=calibrator.wanted_by(pipeline.passes)))
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "model.onnx"
        size = save_model(model, artifact, SaveOptions(jobs=2)).bytes
        zeros = zero_share(open_model(artifact))
        quality = evaluate(
            target.open(artifact, threads=args.threads),
            args.text,
            load_tokenizer(args.model.parent),
            versus=open_session(args.model, threads=args.threads),
            max_tokens=args.tokens,
            threads=args.threads,
        )
    found = quality.difference
    assert found is not None
    figures = (found.ppl_ratio, found.kld_mean, found.kld_p99, found.top1_agreement)
    return Row(passes, size, size / distinct, zeros, *figures)


def zero_share(model: Model) -> float:
    """Return the share of zeros in all float matrices."""
    weights = {weight_of(c).key: weight_of(c) for c in model.constants()}
    matrices = [w for w in weights.values() if len(w.shape) == 2 and str(w.dtype).startswith("float")]
    total = sum(w.size for w in matrices)
    return 1 - sum(int(np.count_nonzero(w.view())) for w in matrices) / max(total, 1)


def show(rows: Iterable[list[str]], *, markdown: bool) -> None:
    """Print a line for each row as soon as it is known."""
    for cells in rows:
        print("| " + " | ".join(cells) + " |" if markdown else "  ".join(cells), flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SAMPLE / "model.onnx")
    parser.add_argument("--text", type=Path, default=SAMPLE / "heldout.txt")
    parser.add_argument("--passes", action="append", help="a list of passes; may be repeated")
    parser.add_argument("--target", default="portable")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calib", type=Path, default=SAMPLE / "calib.txt")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    show([list(HEAD)] + ([["---"] * len(HEAD)] if args.markdown else []), markdown=args.markdown)
    with tempfile.TemporaryDirectory() as folder:
        calibrator = Calibrator(args.model, args.calib, Path(folder), args.threads, Silent())
        rows = (measure(args, passes, calibrator).cells() for passes in args.passes or ROWS)
        show(rows, markdown=args.markdown)


if __name__ == "__main__":
    main()
