"""What low rank costs and saves: splitting by several methods at equal parameters, and compensation of int4 errors.

Every row runs `cleanup`, the safe fusions and its own passes, lowers the model for the portable target, saves it and
compares it with the source on the same held-out tokens (decoders: mean KL divergence; encoders: mean 1 - cosine of the
sentence vectors). The models are those of benchmarks/quality/subjects.py.

    python benchmarks/pruning/low_rank.py                            # the sample model
    python benchmarks/pruning/low_rank.py --data FOLDER              # the story models and MiniLM, too
    python benchmarks/pruning/low_rank.py --write                    # put the tables into docs/pruning.md
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "quality"))

from encoder_quality import compare, embed  # noqa: E402
from recorded import Recorded  # noqa: E402
from subjects import MINILM_NAME, SAMPLE_NAME, Subject, minilm, sample, story, story_names  # noqa: E402

from onnxslim_llm.compiler.calibration import Calibrator  # noqa: E402
from onnxslim_llm.compiler.progress import Silent  # noqa: E402
from onnxslim_llm.ir.model import open_model  # noqa: E402
from onnxslim_llm.ir.save import SaveOptions, save_model  # noqa: E402
from onnxslim_llm.recipe import Recipe  # noqa: E402
from onnxslim_llm.rewrite.context import Context  # noqa: E402
from onnxslim_llm.rewrite.pipeline import Pipeline  # noqa: E402
from onnxslim_llm.runtime.decoder import DecoderRunner  # noqa: E402
from onnxslim_llm.runtime.session import Session, open_session  # noqa: E402
from onnxslim_llm.targets import get_target  # noqa: E402
from onnxslim_llm.verify.quality import evaluate_tokens  # noqa: E402

PAGE = ROOT / "docs" / "pruning.md"
#: Share of the parameters of each weight that its factors have.
RATIOS = (0.9, 0.8)
METHODS = ("svd", "asvd", "whitened")
#: Everything in 4 bits but the tables: what there is to compensate.
INT4 = "quantize_weights{{method={method}, sensitive_bits=4}}"
QUANTIZERS = ("rtn", "search", "calibrated")
COMPENSATION = "compensate_low_rank{rank=32, budget=0.038}"


@dataclass(frozen=True)
class Result:
    """One artifact.

    Attributes:
        bytes: Of its file.
        parameters: Of the weights that were looked at, before and after; none where nothing was split.
        loss: Mean KL divergence in nats, or mean 1 - cosine.
        ppl: Perplexity divided by the source's; 0 for encoders.
    """

    bytes: int
    parameters: tuple[int, int] | None
    loss: float
    ppl: float


class Bench:
    """One model, its calibration statistics and its answers, made once."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject = subject
        self.calibrator = Calibrator(subject.model, subject.calibration, folder, 1, Silent())
        self.source: Session | Recorded = open_session(subject.model, threads=1)
        if subject.kind == "decoder":
            self.source = Recorded(DecoderRunner(self.source))

    def measure(self, passes: str) -> Result:
        """Compile with a list of passes and compare with the source."""
        target = get_target("portable")
        model = open_model(self.subject.model)
        Pipeline(Recipe.load("safe").build()).run(model, Context(target=target))
        pipeline = Pipeline([*Pipeline(passes).passes, *Pipeline(target.lowering).passes])
        context = Context(target=target, statistics=self.calibrator.wanted_by(pipeline.passes))
        records = pipeline.run(model, context)
        split = next((r.detail["parameters"] for r in records if r.name == "split_low_rank" and r.changed), None)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            size = save_model(model, file, SaveOptions(jobs=1)).bytes
            loss, ppl = self._compare(target.open(file, threads=1))
        return Result(size, tuple(split) if split else None, loss, ppl)

    def _compare(self, artifact: Session) -> tuple[float, float]:
        subject = self.subject
        if isinstance(self.source, Session):
            vectors = [embed(session, subject.sentences) for session in (self.source, artifact)]
            return compare(*vectors).distance_mean, 0.0
        found = evaluate_tokens(
            artifact, subject.tokens, versus=self.source, window=subject.window, threads=1, greedy=False
        ).difference
        assert found is not None
        return found.kld_mean, found.ppl_ratio


def splits(bench: Bench) -> Iterator[list[str]]:
    """Measure all ways to split at equal parameters."""
    for ratio in RATIOS:
        taken = 0
        for method in METHODS:
            result = bench.measure(f"split_low_rank{{method={method}, ratio={ratio}, shared=false}}")
            assert result.parameters is not None
            taken = result.parameters[1]
            yield [bench.subject.name, method, f"{ratio} of each weight", *_split_cells(result)]
        for shared in ("false", "true"):
            result = bench.measure(f"split_low_rank{{budget={taken}, shared={shared}, align=4}}")
            what = "shared out, one A an input" if shared == "true" else "shared out over the weights"
            yield [bench.subject.name, "whitened", what, *_split_cells(result)]


def _split_cells(result: Result) -> list[str]:
    before, after = result.parameters or (1, 1)
    ppl = f"{result.ppl:.3f}" if result.ppl else "-"
    return [f"{after / before:.3f}", f"{result.bytes:,}", f"{result.loss:.4f}", ppl]


def compensations(bench: Bench) -> Iterator[list[str]]:
    """Measure int4 with and without compensation."""
    for method in QUANTIZERS:
        steps = INT4.format(method=method)
        plain, better = bench.measure(steps), bench.measure(f"{steps}, {COMPENSATION}")
        more = better.bytes / plain.bytes - 1
        cells = [f"{plain.bytes:,}", f"{plain.loss:.4f}", f"{better.loss:.4f}"]
        yield [bench.subject.name, method, *cells, f"{more:+.1%}", f"{1 - better.loss / plain.loss:.0%}"]


HEADS: dict[str, tuple[str, ...]] = {
    "splits": ("model", "method", "ranks", "parameters", "bytes", "KL or 1 - cos", "perplexity"),
    "compensations": ("model", "int4 by", "bytes", "KL or 1 - cos", "compensated", "bytes more", "gap closed"),
}
TABLES: dict[str, Callable[[Bench], Iterator[list[str]]]] = {"splits": splits, "compensations": compensations}


def subjects(args: argparse.Namespace, work: Path) -> Iterator[Subject]:
    """Yield the models that are asked for and there."""
    makers: dict[str, Callable[[], Subject | None]] = {SAMPLE_NAME: partial(sample, work, args.tokens)}
    for name in story_names(args.data) if args.data else []:
        makers[name] = partial(story, args.data, name, work, args.tokens)
    makers[MINILM_NAME] = partial(minilm, work)
    for name, make in makers.items():
        if (args.data or name == SAMPLE_NAME) and fnmatch.fnmatch(name, args.models):
            subject = make()
            if subject is not None:
                yield subject


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write(page: Path, name: str, lines: list[str]) -> None:
    """Put a table between its two marks in a page."""
    begin, end = f"<!-- low rank {name}: begin -->", f"<!-- low rank {name}: end -->"
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    if not after and end not in text:
        raise SystemExit(f"{page.name} has no place for the table: {begin} {end}")
    page.write_text("\n".join([before + begin, *lines, end + after]), encoding="utf-8")


def main() -> None:
    """Measure and print, and write where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the story models")
    parser.add_argument("--work", type=Path, help="where models and calibration data are prepared; kept")
    parser.add_argument("--models", default="*", help="pattern of names")
    parser.add_argument("--table", choices=TABLES, help="only this one")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--write", action="store_true", help="into docs/pruning.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        benches = [Bench(s, Path(scratch) / f"statistics {s.name}") for s in subjects(args, work)]
        for name in [args.table] if args.table else TABLES:
            lines = [_line(HEADS[name]), "|" + "---|" * len(HEADS[name])]
            print("\n".join(lines), flush=True)
            for bench in benches:
                for cells in TABLES[name](bench):
                    lines.append(_line(cells))
                    print(lines[-1], flush=True)
            if args.write:
                write(PAGE, name, lines)


if __name__ == "__main__":
    main()
