"""What leaving out neurons, heads and blocks costs, and how much of the saved arithmetic is saved time.

`accuracy` compares the sample model with its source on held-out text, with and without the fit of what is left. `speed`
takes random weights in the shapes of TinyLlama (hidden 2048, 32 query and 4 key heads of 64, FFN 5632), two layers of
it, so that matrix products dominate as they do in models of that size, and measures source and smaller models in turn.

    python benchmarks/pruning/structural.py accuracy --write
    python benchmarks/pruning/structural.py speed --threads 1 --write
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from onnxslim_llm.compiler.calibration import Calibrator
from onnxslim_llm.compiler.observation import make_observer
from onnxslim_llm.compiler.progress import Silent
from onnxslim_llm.ir.model import Model, open_model
from onnxslim_llm.ir.save import SaveOptions, save_model
from onnxslim_llm.products.sites import find_groups
from onnxslim_llm.recipe import Recipe
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Change
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.runtime.bench import bench
from onnxslim_llm.runtime.session import open_session
from onnxslim_llm.runtime.tokenizer import load_tokenizer
from onnxslim_llm.targets import get_target
from onnxslim_llm.verify.quality import evaluate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reference_decoder import DecoderSpec, write

ROOT = Path(__file__).resolve().parents[2]
SAMPLE, PAGE = ROOT / "models" / "stdlib-llama", ROOT / "docs" / "pruning.md"

ACCURACY = (
    "prune_neurons{share=0.25",
    "prune_heads{share=0.25",
    "prune_heads{share=0.25, uniform=false",
    "remove_blocks{count=1",
)
SPEED = (
    "prune_neurons{share=0.25, refit=false}",
    "prune_heads{share=0.25, refit=false}",
    "remove_blocks{blocks=[1], refit=false}",
)
SHAPES = DecoderSpec(vocab=4096, hidden=2048, layers=2, heads=32, kv_heads=4, head_dim=64, ffn=5632)


@dataclass
class Bench:
    """The common parts of a run.

    Attributes:
        folder: For what is not kept.
        threads: Of the runtime.
        target: Name of the target.
    """

    folder: Path
    threads: int
    target: str = "ort-cpu"

    def make(self, source: Path, passes: str, context: Context, name: str) -> tuple[Path, Model]:
        """Run the safe fusions, `passes` and the lowering; return the saved file, and the model before lowering."""
        target = get_target(self.target)
        context.target = target
        model = open_model(source)
        Pipeline([*Recipe.load("safe").build(), *Pipeline(passes).passes]).run(model, context)
        before = model.copy()
        Pipeline(target.lowering).run(model, context)
        path = self.folder / name / "model.onnx"
        path.parent.mkdir(exist_ok=True)
        save_model(model, path, SaveOptions(jobs=self.threads))
        return path, before


def accuracy(run: Bench, tokens: int) -> Iterator[list[str]]:
    """Yield the rows of the sample model."""
    yield ["passes", "weights", "KL, cut only", "KL, fitted", "perplexity ratio, fitted", "top-1, fitted"]
    source = SAMPLE / "model.onnx"
    calibrator = Calibrator(source, SAMPLE / "calib.txt", run.folder / "statistics", run.threads, Silent())
    distinct = fused_bytes(source)
    for text in ACCURACY:
        found = []
        for refit in ("false", "true"):
            context = Context(statistics=calibrator.statistics(), observer=make_observer(calibrator))
            path, model = run.make(source, f"{text}, refit={refit}}}", context, "pruned")
            quality = evaluate(
                get_target(run.target).open(path, threads=run.threads),
                SAMPLE / "heldout.txt",
                load_tokenizer(SAMPLE),
                versus=open_session(source, threads=run.threads),
                max_tokens=tokens,
                threads=run.threads,
            )
            assert quality.difference is not None
            found.append((quality.difference, model.weight_bytes() / distinct))
        (cut, size), (fitted, _) = found
        figures = [f"{size:.3f}", f"{cut.kld_mean:.3f}", f"{fitted.kld_mean:.3f}"]
        yield [f"`{text}}}`", *figures, f"{fitted.ppl_ratio:.3f}", f"{fitted.top1_agreement:.3f}"]


def fused_bytes(source: Path) -> int:
    """Return the bytes of the source's weights after the fusions, each counted once."""
    model = open_model(source)
    Pipeline(Recipe.load("safe").build()).run(model, Context())
    return model.weight_bytes()


def products(model: Model) -> int:
    """Return the multiplications of all products for a token."""
    groups = find_groups(model, Change())
    return sum(g.rows * g.columns * sum(site.node.op != "Gather" for site in g.sites) for g in groups)


def speed(run: Bench, prompt: int, steps: int, repeats: int) -> Iterator[list[str]]:
    """Yield the rows of the random model."""
    yield ["passes", "products", "prefill time", "of the saving", "decode time", "of the saving"]
    source = write(SHAPES, run.folder / "source.onnx")
    made = [run.make(source, passes, Context(), f"m{i}") for i, passes in enumerate(("cleanup", *SPEED))]
    report = bench(
        [path for path, _ in made], prompt_tokens=prompt, new_tokens=steps, repeats=repeats, threads=run.threads
    )
    whole, base = products(made[0][1]), report.results[0]
    for passes, (_, model), result in zip(SPEED, made[1:], report.results[1:], strict=True):
        share = products(model) / whole
        cells = [f"`{passes}`", f"{share:.3f}"]
        for name in ("prefill", "decode"):
            # Each round measures all models one after another: the smallest time of each is the least disturbed.
            ratio = min(result.samples[name]) / min(base.samples[name])
            cells += [f"{ratio:.3f}", f"{(1 - ratio) / (1 - share):.2f}"]
        yield cells


def put(page: Path, name: str, lines: list[str]) -> None:
    """Write a table into the page, between the marks that are there for it."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{page.name} has no place for the table: {begin} {end}")
    page.write_text("\n".join([before + begin, *lines, end + after]), encoding="utf-8")


def main() -> None:
    """Print a table, and write it into the docs if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["accuracy", "speed"])
    parser.add_argument("--tokens", type=int, default=4096, help="of held-out text")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        run = Bench(Path(folder), args.threads)
        rows = (
            accuracy(run, args.tokens)
            if args.table == "accuracy"
            else speed(run, args.prompt, args.steps, args.repeats)
        )
        for number, cells in enumerate(rows):
            lines.append("| " + " | ".join(cells) + " |")
            lines += ["| --- " * len(cells) + "|"] if not number else []
            print(lines[-1] if number else "\n".join(lines), flush=True)
    if args.write:
        put(PAGE, f"structured {args.table}", lines)


if __name__ == "__main__":
    main()
