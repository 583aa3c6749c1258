"""What can be left out because it says nothing: hidden channels that hardly vary, and tokens that a text does not have.

Every row is an ordinary compile of recipe `safe` with one more pass, compared with the source on the same held-out
tokens (decoders: mean KL divergence) or sentences (encoders: mean 1 - cosine). The models are those of
benchmarks/quality/subjects.py.

    python benchmarks/pruning/left_out.py                            # the sample model
    python benchmarks/pruning/left_out.py --data FOLDER              # the story models and MiniLM, too
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "quality"))

from encoder_quality import compare, embed  # noqa: E402
from subjects import Subject, minilm, sample, story, story_names  # noqa: E402

from onnxslim_llm.artifact.manifest import Manifest  # noqa: E402
from onnxslim_llm.compiler import compile as compile_model  # noqa: E402
from onnxslim_llm.compiler.calibration import Calibrator  # noqa: E402
from onnxslim_llm.compiler.progress import Silent  # noqa: E402
from onnxslim_llm.ir.model import open_model  # noqa: E402
from onnxslim_llm.ir.weights import weight_of  # noqa: E402
from onnxslim_llm.passes.prune.rows.refit_rows_job import fitted_rows  # noqa: E402
from onnxslim_llm.products.hidden import find_hidden_layers  # noqa: E402
from onnxslim_llm.recipe import Recipe, Step  # noqa: E402
from onnxslim_llm.rewrite.passes import Change  # noqa: E402
from onnxslim_llm.rewrite.pipeline import Pipeline  # noqa: E402
from onnxslim_llm.runtime.session import open_session  # noqa: E402
from onnxslim_llm.stats.statistics import Collected  # noqa: E402
from onnxslim_llm.verify.quality import evaluate_tokens  # noqa: E402

LIMITS = (0.001, 0.01, 0.03, 0.1)
MIN_COUNTS = (1, 3, 10, 30)
SHARES = (0.75, 0.5)  # of the channels that are left where biases are compared
TOKENS = 8192
Array = NDArray[Any]


def left_out(subject: Subject, work: Path, step: dict[str, Any]) -> tuple[Manifest, float, float]:
    """Compile with one more pass; return the manifest, the loss, and the share of held-out tokens that are gone."""
    base = Recipe.load("safe")
    recipe = base.model_copy(update={"passes": (*base.passes, Step.model_validate(step)), "gates": "int4"})
    result = compile_model(
        subject.model,
        work / "artifact",
        recipe=recipe,
        calib=subject.calibration,
        statistics=work / f"statistics {subject.name}",
        jobs=1,
        verify="off",
        force=True,
    )
    file = result.path / "model.onnx"
    if subject.kind != "decoder":
        vectors = [embed(open_session(each, threads=1), subject.sentences) for each in (subject.model, file)]
        known = [d["kept"] for entry in result.manifest.passes if "kept" in (d := entry.detail)]
        fed = [int(i) for feeds in subject.sentences for i in feeds["input_ids"].reshape(-1)]
        gone = sum(not any(a <= i <= b for a, b in known[0]) for i in fed) / len(fed) if known else 0.0
        return result.manifest, compare(*vectors).distance_mean, gone
    tokens = subject.tokens[:TOKENS]
    found = evaluate_tokens(file, tokens, versus=subject.model, window=subject.window, threads=1, greedy=False)
    assert found.difference is not None
    return result.manifest, found.difference.kld_mean, found.left_out / (found.left_out + found.tokens)


def channels(subject: Subject, work: Path) -> Iterator[list[str]]:
    """Measure `fold_constant_neurons` over its limit."""
    for limit in LIMITS:
        step = {"name": "fold_constant_neurons", "limit": limit, "align": 1}
        manifest, loss, _ = left_out(subject, work, step)
        layers = next((e.detail.get("layers", []) for e in manifest.passes if e.name == step["name"]), [])
        gone = [f"{layer['channels'][0] - layer['channels'][1]}/{layer['channels'][0]}" for layer in layers]
        yield [subject.name, f"{limit:g}", ", ".join(gone) or "none", f"{manifest.artifact.bytes:,}", f"{loss:.2g}"]


def tokens(subject: Subject, work: Path) -> Iterator[list[str]]:
    """Measure `prune_vocabulary` over how often a token must occur in the calibration data."""
    for least in MIN_COUNTS:
        manifest, loss, gone = left_out(subject, work, {"name": "prune_vocabulary", "min_count": least})
        detail = next(e.detail for e in manifest.passes if e.name == "prune_vocabulary")
        kept = "{1:,} of {0:,}".format(*detail["tokens"]) if detail else "all"
        share = manifest.artifact.bytes / manifest.source.bytes
        cells = [kept, f"{manifest.artifact.bytes:,}", f"{share:.3f}", f"{gone:.1%}", f"{loss:.2g}"]
        yield [subject.name, str(least), *cells]


def biases(subject: Subject, work: Path) -> Iterator[list[str]]:
    """Measure what a bias adds to fitted rows: relative squared errors of each layer's output on held-out samples."""
    folder = work / f"statistics {subject.name}"
    statistics = Calibrator(subject.model, subject.calibration, folder, 1, Silent()).statistics()
    model = open_model(subject.model)
    Pipeline(Recipe.load("safe").build()).run(model)
    assert statistics is not None
    for layer in find_hidden_layers(model, Change()):
        stored = statistics.of_weight(layer.weight.name)
        if stored is None:
            continue
        collected = stored.load()
        source = weight_of(layer.weight).view().astype(np.float64)
        weight = source if layer.k_axis == 0 else source.T
        for share in SHARES:
            kept = np.sort(
                np.argsort(-np.square(weight).sum(1) * collected.fit.mean_square)[: round(len(weight) * share)]
            )
            yield [subject.name, f"{share:g}", *(f"{e:.4f}" for e in _errors(weight, kept, collected))]


def _errors(weight: Array, kept: Array, collected: Collected) -> Iterator[float]:
    """Yield the errors of the rows that are left, fitted ones, these with a bias, and rows and bias fitted together."""
    fit, held = collected.fit, collected.held
    assert fit.gram is not None
    assert held.gram is not None
    centred = fit.gram - fit.count * np.outer(fit.mean, fit.mean)
    fitted, together = (fitted_rows(weight, kept, gram) for gram in (fit.gram, centred))
    signal = np.einsum("kn,kn->", weight, held.gram @ weight)
    for rows, biased in ((weight[kept], False), (fitted, False), (fitted, True), (together, True)):
        change = weight.copy()
        change[kept] -= rows
        bias = fit.mean @ change if biased else np.zeros(weight.shape[1])
        lost = np.einsum("kn,kn->", change, held.gram @ change)
        yield float((lost + held.count * ((bias - 2 * held.mean @ change) @ bias)) / signal)


TABLES = {
    "channels": (channels, ["model", "limit", "channels left out", "bytes", "KL or 1 - cos"]),
    "tokens": (tokens, ["model", "min_count", "tokens kept", "bytes", "ratio", "held-out gone", "KL or 1 - cos"]),
    "biases": (biases, ["model", "left", "rows as they were", "fitted", "and a bias", "fitted together"]),
}


def subjects(data: Path | None, work: Path) -> Iterator[Subject]:
    """Yield the models that are there."""
    yield sample(work, TOKENS)
    if data is not None:
        for name in story_names(data):
            yield story(data, name, work, TOKENS)
        encoder = minilm(work)
        if encoder is not None:
            yield encoder


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the story models")
    parser.add_argument("--models", default="*", help="pattern of names")
    parser.add_argument("--table", choices=TABLES, help="only this one")
    parser.add_argument("--work", type=Path, help="where models and calibration data are prepared; kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        named = (s for s in subjects(args.data, args.work or Path(scratch)) if fnmatch.fnmatch(s.name, args.models))
        found = list(named)
        for measure, head in [TABLES[args.table]] if args.table else TABLES.values():
            print("| " + " | ".join(head) + " |\n|" + "---|" * len(head), flush=True)
            for subject in found:
                for cells in measure(subject, Path(scratch)):
                    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
