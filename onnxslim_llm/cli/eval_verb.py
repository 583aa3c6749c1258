"""onnxslim-llm eval."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxslim_llm.cli.output import Output, output_options
from onnxslim_llm.cli.params import PATH

if TYPE_CHECKING:
    from onnxslim_llm.verify.quality import Quality

__all__ = ["command"]


@click.command("eval")
@click.argument("model", type=PATH)
@click.option("--text", type=PATH, required=True, help="A UTF-8 text that the model has not seen.")
@click.option("--vs", "other", metavar="B", type=PATH, help="The model that it was made from; gives the divergence.")
@click.option("--tokenizer", type=PATH, help="tokenizer.json or its folder. [default: the model's folder]")
@click.option("--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of context.")
@click.option("--max-tokens", type=click.IntRange(min=2), help="Use only the beginning of the text.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Of the runtime; 0: its own choice.")
@output_options
def command(
    model: Path,
    text: Path,
    other: Path | None,
    tokenizer: Path | None,
    window: int,
    max_tokens: int | None,
    threads: int,
    output: Output,
) -> None:
    """Measure how well MODEL predicts a text: perplexity, and with --vs the KL divergence from B, token by token."""
    from onnxslim_llm.cli.progress import TerminalProgress
    from onnxslim_llm.cli.sessions import open_as_meant
    from onnxslim_llm.ir.model import resolve_model_path
    from onnxslim_llm.runtime.tokenizer import load_tokenizer
    from onnxslim_llm.verify.quality import evaluate

    path = resolve_model_path(model)
    source = resolve_model_path(other) if other else None
    words = load_tokenizer(tokenizer or path)
    with TerminalProgress(output) as progress:
        progress.stage("evaluate", None, "tokens")
        quality = evaluate(
            open_as_meant(path, threads=threads),
            text,
            words,
            versus=open_as_meant(source, threads=threads) if source else None,
            window=window,
            max_tokens=max_tokens,
            progress=lambda done, total: progress.advance(done, f"{done} of {total}"),
        )
    output.result(quality.to_json(), *([] if output.json else [_table(quality)]))


def _table(quality: Quality) -> Any:
    from onnxslim_llm.report.format import count_text, figure_text, percent_text
    from onnxslim_llm.report.tables import plain_table

    rows = [
        ["tokens", count_text(quality.tokens)],
        ["perplexity", figure_text(quality.ppl)],
        ["bits per byte", figure_text(quality.bits_per_byte)],
    ]
    versus = quality.difference
    if versus is not None:
        rows += [
            ["perplexity of B", figure_text(versus.ppl_source)],
            ["ratio", f"{versus.ppl_ratio:.4f}x"],
            ["mean KL(B, model)", figure_text(versus.kld_mean)],
            ["99th percentile KL", figure_text(versus.kld_p99)],
            ["top-1 agreement", percent_text(versus.top1_agreement)],
        ]
    return plain_table(["", ">"], rows)
