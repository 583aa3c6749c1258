"""onnxslim-llm sweep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from onnxslim_llm.cli.output import Output, output_options
from onnxslim_llm.cli.params import PATH, pairs

if TYPE_CHECKING:
    from onnxslim_llm.artifact.sweep_record import SweepRecord

__all__ = ["command"]


@click.command("sweep")
@click.argument("model", type=PATH)
@click.option("-o", "--output", "out", metavar="DIR", type=PATH, required=True, help="The folder of the results.")
@click.option("--text", type=PATH, required=True, help="A UTF-8 text that the model has not seen.")
@click.option(
    "--recipe",
    "--recipes",
    "recipes",
    metavar="NAME|FILE.toml,...",
    multiple=True,
    help="What the points begin with. [default: by model]",
)
@click.option("--grid", metavar="PASS.OPTION=V1,V2,...", multiple=True, help="Values of an option; several multiply.")
@click.option("--set", "settings", metavar="PASS.OPTION=VALUE", multiple=True, help="An option of all points.")
@click.option("--target", metavar="NAME", help="The runtime that the artifacts are for.")
@click.option("--target-option", "target_options", metavar="NAME=VALUE", multiple=True, help="An option of the target.")
@click.option("--calib", metavar="FILE|DIR", type=PATH, help="As for compile; statistics are collected once.")
@click.option("--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of context.")
@click.option(
    "--max-tokens", type=click.IntRange(min=2), default=8192, show_default=True, help="Of the text, from its beginning."
)
@click.option(
    "--bench-rounds", type=click.IntRange(min=0), default=3, show_default=True, help="Of the speed; 0: not measured."
)
@click.option(
    "--verify",
    type=click.Choice(["fast", "full", "off"]),
    default="off",
    show_default=True,
    help="Let points that miss the gates of compile fail.",
)
@click.option(
    "--keep-artifacts",
    "keep",
    type=click.Choice(["none", "pareto", "all"]),
    default="none",
    show_default=True,
    help="Which artifacts stay in DIR; every point's recipe does.",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Threads of each point. [default: all usable CPUs]")
@output_options
def command(
    model: Path,
    out: Path,
    text: Path,
    recipes: tuple[str, ...],
    grid: tuple[str, ...],
    settings: tuple[str, ...],
    target: str | None,
    target_options: tuple[str, ...],
    calib: Path | None,
    window: int,
    max_tokens: int,
    bench_rounds: int,
    verify: Literal["fast", "full", "off"],
    keep: Literal["none", "pareto", "all"],
    jobs: int | None,
    output: Output,
) -> None:
    """Compile MODEL in many ways and measure each: bytes, perplexity, KL divergence, speed, and the Pareto front.

    DIR then holds sweep.csv, sweep.json, report.html, and the recipe of every point. The same command goes on after an
    interruption; other grids add to what DIR holds.
    """
    from onnxslim_llm.cli.progress import TerminalProgress
    from onnxslim_llm.compiler.sweep import sweep

    given: dict[str, Any] = {} if target is None else {"target": target}
    with TerminalProgress(output) as progress:
        result = sweep(
            model,
            out,
            text=text,
            recipes=[name for listed in recipes for name in listed.split(",") if name],
            grid=grid,
            settings=settings,
            calib=calib,
            target_options=pairs(target_options, "--target-option"),
            window=window,
            max_tokens=max_tokens,
            bench_rounds=bench_rounds,
            verify=verify,
            keep=keep,
            jobs=jobs,
            progress=progress,
            **given,
        )
    if output.json:
        click.echo(result.record.dumps(), nl=False)
        return
    output.result({}, _table(result.record))
    output.note(f"wrote {result.path}; open {result.path / 'report.html'} for the plots")


def _table(record: SweepRecord) -> Any:
    from onnxslim_llm.artifact.sweep_record import setting_text
    from onnxslim_llm.report.format import bytes_text, figure_text
    from onnxslim_llm.report.tables import plain_table

    def times(ratio: float | None, digits: int) -> str:
        return "–" if ratio is None else f"{ratio:.{digits}f}x"

    rows = []
    for point in sorted(record.points, key=lambda p: (p.status == "failed", -(p.bytes or 0))):
        figures = ["failed", *[""] * 3]
        if point.status == "ok":
            figures = [
                bytes_text(point.bytes or 0),
                figure_text(point.kld_mean, 3),
                times(point.ppl_ratio, 3),
                times(point.decode_ratio, 2),
            ]
        settings = [setting_text(point.settings.get(axis)) for axis in record.axes]
        rows.append(["*" if point.pareto else "", point.base, *settings, *figures])
    headers = ["", "=recipe", *(f"={name}" for name in record.axes.values()), ">bytes", ">KL", ">ppl", ">decode"]
    return plain_table(headers, rows)
