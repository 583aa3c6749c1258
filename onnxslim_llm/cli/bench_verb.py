"""onnxslim-llm bench."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxslim_llm.cli.output import Output, output_options
from onnxslim_llm.cli.params import PATH

if TYPE_CHECKING:
    from onnxslim_llm.runtime.bench import BenchReport

__all__ = ["command"]


@click.command("bench")
@click.argument("model", type=PATH)
@click.option("--vs", "others", metavar="B", type=PATH, multiple=True, help="Another model, measured in turn.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="For prefill.")
@click.option("--new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="For decode.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds; medians are given.")
@click.option("--threads", type=click.IntRange(min=1), help="Of the runtime. [default: all usable CPUs]")
@output_options
def command(
    model: Path,
    others: tuple[Path, ...],
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    threads: int | None,
    output: Output,
) -> None:
    """Measure MODEL: prefill and decode speed, load time, peak memory; each model in a process of its own."""
    from onnxslim_llm.cli.progress import TerminalProgress
    from onnxslim_llm.ir.model import resolve_model_path
    from onnxslim_llm.runtime.bench import bench

    paths = [resolve_model_path(path) for path in (model, *others)]
    with TerminalProgress(output) as progress:
        progress.stage("measure", None)
        report = bench(
            paths,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            threads=threads,
            progress=lambda done, total: progress.advance(done, f"{done} of {total}"),
        )
    output.result(report.to_json(), *([] if output.json else _page(report)))


def _page(report: BenchReport) -> list[Any]:
    from rich.text import Text

    from onnxslim_llm.report.format import bytes_text, seconds_text
    from onnxslim_llm.report.tables import plain_table

    rows = []
    for result in report.results:
        rates = [result.prefill_tokens_per_second, result.decode_tokens_per_second]
        rows.append(
            [
                str(Path(*Path(result.model).parts[-2:])),
                bytes_text(result.file_bytes),
                seconds_text(result.load_seconds),
                *(f"{rate:.1f}" if rate else "–" for rate in rates),
                seconds_text(result.run_seconds) if result.run_seconds else "–",
                bytes_text(result.peak_rss_bytes),
            ]
        )
    headers = ["model", ">files", ">load", ">prefill\ntok/s", ">decode\ntok/s", ">one\nrun", ">peak\nmemory"]
    note = (
        f"medians of {report.repeats} rounds, {report.threads} threads, batch 1; "
        f"prefill {report.prompt_tokens} tokens, decode {report.new_tokens} tokens"
    )
    return [plain_table(headers, rows), Text(note, style="dim")]
