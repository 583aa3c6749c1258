"""What masks of zeros cost: mean KL divergence to the source, for each method, pattern, and with and without a refit.

Every cell runs `cleanup`, the safe fusions and its own passes, and compares the result with the source on held-out
tokens, in ONNX Runtime. The models are those of benchmarks/quality/subjects.py.

    python benchmarks/pruning/table.py                                   # the sample model
    python benchmarks/pruning/table.py --data FOLDER                     # the story models, too
    python benchmarks/pruning/table.py --write                           # put the tables into docs/pruning.md
    python benchmarks/pruning/table.py --passes "prune_neurons{share=0.5}"   # bytes and figures of any list of passes
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "quality"))

from recorded import Recorded  # noqa: E402
from subjects import SAMPLE_NAME, Subject, sample, story, story_names  # noqa: E402

from onnxslim_llm.compiler.calibration import Calibrator  # noqa: E402
from onnxslim_llm.compiler.lowering import in_order  # noqa: E402
from onnxslim_llm.compiler.observation import make_gradient_source  # noqa: E402
from onnxslim_llm.compiler.progress import Silent  # noqa: E402
from onnxslim_llm.gradients.source import Figure, GradientSource, StoredFigures  # noqa: E402
from onnxslim_llm.ir.model import Model, open_model  # noqa: E402
from onnxslim_llm.ir.save import SaveOptions, save_model  # noqa: E402
from onnxslim_llm.ir.weights import weight_of  # noqa: E402
from onnxslim_llm.recipe import Recipe  # noqa: E402
from onnxslim_llm.rewrite.context import Context  # noqa: E402
from onnxslim_llm.rewrite.pipeline import Pipeline  # noqa: E402
from onnxslim_llm.runtime.decoder import DecoderRunner  # noqa: E402
from onnxslim_llm.runtime.session import open_session  # noqa: E402
from onnxslim_llm.targets import get_target  # noqa: E402
from onnxslim_llm.verify.quality import Difference, evaluate_tokens  # noqa: E402

PAGE = ROOT / "docs" / "pruning.md"
PATTERNS = ("unstructured", "2:4")
#: What is said of a method, and its options.
METHODS = {
    "magnitude": "method=magnitude",
    "Wanda, within columns": "method=wanda, compare=column",
    "Wanda": "method=wanda",
    "Taylor": "method=taylor",
    "Fisher": "method=fisher",
    "SparseGPT": "method=sparsegpt",
}
#: Ways to share out zeros and to get there, all with a refit.
SHARES = (0.5, 0.7)
WAYS = {
    "SparseGPT, uniform": "method=sparsegpt",
    "SparseGPT, by outliers": "method=sparsegpt, allocation=outliers",
    "SparseGPT, by sensitivity": "method=sparsegpt, allocation=sensitivity",
    "SparseGPT, 4 steps": "method=sparsegpt, steps=4",
    "SparseGPT, 4 steps, by sensitivity": "method=sparsegpt, steps=4, allocation=sensitivity",
    "Fisher, 4 steps, by sensitivity": "method=fisher, steps=4, allocation=sensitivity",
}


@dataclass
class _Remembered:
    """Figures of gradients of one model, computed once: all cells begin with the same weights."""

    source: GradientSource
    known: dict[Figure, Mapping[str, StoredFigures]] = field(default_factory=dict)

    def check(self) -> None:
        self.source.check()

    def figures(self, model: Model, weights: Sequence[str], figure: Figure) -> Mapping[str, StoredFigures]:
        if figure not in self.known:
            self.known[figure] = self.source.figures(model, weights, figure)
        return self.known[figure]


class Bench:
    """One model, its calibration statistics and its answers, made once."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject = subject
        self.calibrator = Calibrator(subject.model, subject.calibration, folder, 1, Silent())
        self.gradients = _Remembered(make_gradient_source(self.calibrator))
        self.source = Recorded(DecoderRunner(open_session(subject.model, threads=1)))

    def measure(self, passes: str) -> tuple[Difference, int, float]:
        """Return the difference from the source after some passes, the bytes of the artifact and its share of zeros."""
        target = get_target("portable")
        model = open_model(self.subject.model)
        Pipeline(Recipe.load("safe").build()).run(model, Context(target=target))
        pipeline = Pipeline(in_order(Pipeline(passes).passes, Pipeline(target.lowering).passes))
        statistics = self.calibrator.wanted_by(pipeline.passes)
        pipeline.run(model, Context(target=target, statistics=statistics, gradients=self.gradients))
        with tempfile.TemporaryDirectory() as folder:
            artifact = Path(folder) / "model.onnx"
            size = save_model(model, artifact, SaveOptions(jobs=1)).bytes
            zeros = zero_share(open_model(artifact))
            found = evaluate_tokens(
                target.open(artifact, threads=1),
                self.subject.tokens,
                versus=self.source,
                window=self.subject.window,
                threads=1,
                greedy=False,
            ).difference
        assert found is not None
        return found, size, zeros

    def loss(self, options: str) -> str:
        """Return the mean KL divergence in nats after `prune_weights` with these options."""
        return f"{self.measure(f'prune_weights{{{options}}}')[0].kld_mean:.3f}"


def zero_share(model: Model) -> float:
    """Return the share of zeros in all float matrices."""
    weights = {weight_of(c).key: weight_of(c) for c in model.constants()}
    matrices = [w for w in weights.values() if len(w.shape) == 2 and str(w.dtype).startswith("float")]
    total = sum(w.size for w in matrices)
    return 1 - sum(int(np.count_nonzero(w.view())) for w in matrices) / max(total, 1)


def _matching(options: dict[str, str], pattern: str) -> Iterator[tuple[str, str]]:
    return ((name, value) for name, value in options.items() if fnmatch.fnmatch(name, pattern))


def masks(bench: Bench, rows: str) -> Iterator[list[str]]:
    """Measure each method with both patterns, and with and without a refit."""
    for name, options in _matching(METHODS, rows):
        cells = []
        for pattern in PATTERNS:
            for refit in ("false", "true"):
                same = pattern != "unstructured" and "column" in options  # groups of 4 lie in a column anyway
                cells.append("" if same else bench.loss(f"{options}, pattern='{pattern}', refit={refit}"))
        yield [bench.subject.name, name, *cells]


def ways(bench: Bench, rows: str) -> Iterator[list[str]]:
    """Measure ways to share out the zeros."""
    for name, options in _matching(WAYS, rows):
        yield [bench.subject.name, name, *(bench.loss(f"{options}, sparsity={share}") for share in SHARES)]


HEADS = {
    "masks": ["model", "method", "50 %", "50 %, refit", "2:4", "2:4, refit"],
    "ways": ["model", "way", *(f"{share:.0%}" for share in SHARES)],
}
TABLES = {"masks": masks, "ways": ways}


def details(bench: Bench, lists: list[str]) -> Iterator[list[str]]:
    """Measure any lists of passes."""
    yield ["passes", "bytes", "zeros", "perplexity", "KL", "KL p99", "top-1"]
    for passes in lists:
        found, size, zeros = bench.measure(passes)
        figures = (zeros, found.ppl_ratio, found.kld_mean, found.kld_p99, found.top1_agreement)
        yield [f"`{passes}`", f"{size:,}", *(f"{figure:.3f}" for figure in figures)]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write(page: Path, name: str, lines: list[str]) -> None:
    """Put a table between its two marks in a page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = page.read_text(encoding="utf-8")
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise SystemExit(f"{page.name} has no place for the table: {begin} {end}")
    page.write_text("\n".join([before + begin, *lines, end + after]), encoding="utf-8")


def subjects(args: argparse.Namespace, work: Path) -> Iterator[Subject]:
    """Yield the models that are asked for and there."""
    if fnmatch.fnmatch(SAMPLE_NAME, args.models):
        yield sample(work, args.tokens)
    for name in story_names(args.data) if args.data else []:
        if fnmatch.fnmatch(name, args.models):
            yield story(args.data, name, work, args.tokens)


def main() -> None:
    """Measure and print, and write where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the story models")
    parser.add_argument("--models", default="*", help="pattern of names")
    parser.add_argument("--rows", default="*", help="pattern of the first words of rows")
    parser.add_argument("--table", choices=TABLES, help="only this one")
    parser.add_argument("--passes", action="append", help="instead of the tables; may be repeated")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--write", action="store_true", help="into docs/pruning.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        benches = [Bench(s, Path(scratch) / f"statistics {s.name}") for s in subjects(args, Path(scratch))]
        if args.passes:
            for bench in benches:
                for cells in details(bench, args.passes):
                    print(_line(cells), flush=True)
            return
        for name in [args.table] if args.table else TABLES:
            lines = [_line(HEADS[name]), "|" + "---|" * len(HEADS[name])]
            print("\n".join(lines), flush=True)
            for bench in benches:
                for cells in TABLES[name](bench, args.rows):
                    lines.append(_line(cells))
                    print(lines[-1], flush=True)
            if args.write:
                write(PAGE, name, lines)


if __name__ == "__main__":
    main()
