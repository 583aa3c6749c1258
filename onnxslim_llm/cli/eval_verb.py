"""onnxslim-llm eval."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxslim_llm.cli.output import Output, output_options
from onnxslim_llm.cli.params import PATH

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnxslim_llm.cli.progress import TerminalProgress
    from onnxslim_llm.runtime.session import Session
    from onnxslim_llm.runtime.tokenizer import TextTokenizer
    from onnxslim_llm.verify.quality import Quality

__all__ = ["command"]


@click.command("eval")
@click.argument("models", metavar="MODEL...", type=PATH, nargs=-1, required=True)
@click.option("--text", type=PATH, required=True, help="A UTF-8 text that the model has not seen.")
@click.option("--vs", "other", metavar="B", type=PATH, help="The model that they were made from; gives the divergence.")
@click.option("--tokenizer", type=PATH, help="tokenizer.json or its folder. [default: the folder of MODEL, or of B]")
@click.option("--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of context.")
@click.option("--max-tokens", type=click.IntRange(min=2), help="Use only the beginning of the text.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Of the runtime; 0: its own choice.")
@output_options
def command(
    models: tuple[Path, ...],
    text: Path,
    other: Path | None,
    tokenizer: Path | None,
    window: int,
    max_tokens: int | None,
    threads: int,
    output: Output,
) -> None:
    """Measure how well MODEL predicts a text: perplexity, and with --vs the KL divergence from B, token by token.

    Several models are measured on the same tokens, side by side. A .gguf file runs in llama.cpp, if llama-cpp-python
    is installed; it has to be of the same model, with the same tokens.
    """
    from onnxslim_llm.cli.progress import TerminalProgress
    from onnxslim_llm.verify.quality import evaluate

    files = [_resolve(model) for model in models]
    source = _resolve(other) if other else None
    words = _tokenizer(tokenizer, files, source)
    found = []
    with TerminalProgress(output) as progress:
        for model, file in zip(models, files, strict=True):
            progress.stage("evaluate", None, "tokens")
            name = f" {model.name}" if len(files) > 1 else ""
            tell = partial(_tell, progress, name)
            quality = evaluate(
                _open(file, threads),
                text,
                words,
                versus=_open(source, threads) if source else None,
                window=window,
                max_tokens=max_tokens,
                threads=threads,
                progress=tell,
            )
            found.append((str(model), _bytes(file), quality))
    records = [{**quality.to_json(), "model": name, "bytes": size} for name, size, quality in found]
    result = records[0] if len(records) == 1 else {"models": records}
    output.result(result, *([] if output.json else [_table(found)]))


def _tell(progress: TerminalProgress, name: str, done: int, total: int) -> None:
    progress.advance(done, f"{done} of {total}{name}")


def _resolve(path: Path) -> Path:
    """The file of a model: .gguf as it is, else the one .onnx file."""
    from onnxslim_llm.ir.model import resolve_model_path
    from onnxslim_llm.runtime.gguf import GGUF_SUFFIX

    return path if path.suffix == GGUF_SUFFIX else resolve_model_path(path)


def _open(file: Path, threads: int) -> Path | Session:
    """An open session; a .gguf file is opened where its window is known."""
    from onnxslim_llm.cli.sessions import open_as_meant
    from onnxslim_llm.runtime.gguf import GGUF_SUFFIX

    return file if file.suffix == GGUF_SUFFIX else open_as_meant(file, threads=threads)


def _tokenizer(given: Path | None, files: Sequence[Path], source: Path | None) -> TextTokenizer:
    """The tokenizer that was named, or the first one that lies beside a model."""
    from onnxslim_llm.runtime.tokenizer import load_tokenizer

    beside = [file.parent for file in [*files, *([source] if source else [])]]
    return load_tokenizer(given or next((d for d in beside if (d / "tokenizer.json").is_file()), files[0]))


def _bytes(file: Path) -> int:
    from onnxslim_llm.runtime.bench import stored_bytes
    from onnxslim_llm.runtime.gguf import GGUF_SUFFIX

    return file.stat().st_size if file.suffix == GGUF_SUFFIX else stored_bytes(file)


def _table(found: Sequence[tuple[str, int, Quality]]) -> Any:
    from onnxslim_llm.report.format import bytes_text, count_text, figure_text, percent_text
    from onnxslim_llm.report.tables import plain_table

    qualities = [quality for _, _, quality in found]
    rows = [
        ["bytes", *(bytes_text(size) for _, size, _ in found)],
        ["tokens", *(count_text(q.tokens) for q in qualities)],
        ["perplexity", *(figure_text(q.ppl) for q in qualities)],
        ["bits per byte", *(figure_text(q.bits_per_byte) for q in qualities)],
    ]
    if any(q.left_out for q in qualities):
        rows.insert(2, ["not in its vocabulary", *(count_text(q.left_out) for q in qualities)])
    versus = [q.difference for q in qualities if q.difference is not None]
    if versus:
        rows += [
            ["perplexity of B", *(figure_text(d.ppl_source) for d in versus)],
            ["ratio", *(f"{d.ppl_ratio:.4f}x" for d in versus)],
            ["mean KL(B, model)", *(figure_text(d.kld_mean) for d in versus)],
            ["99th percentile KL", *(figure_text(d.kld_p99) for d in versus)],
            ["top-1 agreement", *(percent_text(d.top1_agreement) for d in versus)],
            ["same greedy text", *(percent_text(d.greedy.prefix_match) if d.greedy else "–" for d in versus)],
        ]
    names = [f">{Path(name).name or name}" for name, _, _ in found] if len(found) > 1 else [">"]
    return plain_table(["", *names], rows)
