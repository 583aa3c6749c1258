"""onnxslim-llm compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from onnxslim_llm.cli.output import Output, output_options
from onnxslim_llm.cli.params import PATH, pairs, size_option

__all__ = ["command"]


@click.command("compile")
@click.argument("model", type=PATH)
@click.option(
    "-o",
    "--output",
    "out",
    metavar="DIR",
    type=PATH,
    help="The artifact's folder. [default: <stem>.slim; of model.onnx, <its folder>.slim]",
)
@click.option("--target", metavar="NAME", help="The runtime it is for; `targets` lists them.")
@click.option("--recipe", metavar="NAME|FILE.toml", help="What to do; `passes` lists the presets. [default: by model]")
@click.option("--set", "settings", metavar="PASS.OPTION=VALUE", multiple=True, help="Change an option of the recipe.")
@click.option(
    "--calib",
    metavar="FILE|DIR",
    type=PATH,
    help="Text, .jsonl or .npz inputs to verify and calibrate with; 'self': the model writes its own text.",
)
@click.option(
    "--shape",
    "shapes",
    metavar="[GRAPH:]NAME=SIZE,...",
    multiple=True,
    help="Fix symbolic sizes, like batch=1,seq=128,past=0; targets without dynamic shapes need all of them. With "
    "prefill: and decode: in front, make two graphs that share their weights.",
)
@click.option("--target-option", "target_options", metavar="NAME=VALUE", multiple=True, help="An option of the target.")
@click.option(
    "--kv-cache",
    type=click.Choice(["separate", "shared", "int8"]),
    default="separate",
    show_default=True,
    help="Cache tensors as they are, or one buffer extended in place, or that in int8.",
)
@click.option("--opset", type=click.IntRange(min=1), metavar="N", help="Version of ai.onnx. [default: what is needed]")
@click.option("--add-kv-cache", is_flag=True, help="Give a decoder that reads the whole text in every run a KV cache.")
@click.option(
    "--logits",
    type=click.Choice(["all", "last"]),
    default="all",
    show_default=True,
    help="Logits of every token, or of the last one: all that generating needs.",
)
@click.option("--bundle-ops", is_flag=True, help="Put the operator library of target ort-cpu-ops into DIR.")
@click.option("--jobs", type=click.IntRange(min=1), help="Threads. [default: all usable CPUs]")
@click.option("--memory-limit", metavar="SIZE", callback=size_option, help="Memory for weights in work, like 800MB.")
@click.option(
    "--verify", type=click.Choice(["fast", "full", "off"]), default="fast", show_default=True, help="How thoroughly."
)
@click.option("--resume", is_flag=True, help="Go on from an interrupted compile.")
@click.option("--force", is_flag=True, help="Replace an existing artifact.")
@output_options
def command(
    model: Path,
    out: Path | None,
    target: str | None,
    recipe: str | None,
    settings: tuple[str, ...],
    calib: Path | None,
    shapes: tuple[str, ...],
    target_options: tuple[str, ...],
    kv_cache: Literal["separate", "shared", "int8"],
    add_kv_cache: bool,
    logits: Literal["all", "last"],
    opset: int | None,
    bundle_ops: bool,
    jobs: int | None,
    memory_limit: int | None,
    verify: Literal["fast", "full", "off"],
    resume: bool,
    force: bool,
    output: Output,
) -> None:
    """Turn MODEL into a small, fast, verified artifact.

    MODEL is an .onnx file (external data beside it) or a folder with exactly one. DIR then holds model.onnx, its data,
    manifest.json and report.html; it appears complete or not at all.
    """
    from onnxslim_llm import compiler
    from onnxslim_llm.cli.progress import TerminalProgress
    from onnxslim_llm.errors import GateError

    given: dict[str, Any] = {} if target is None else {"target": target}
    with TerminalProgress(output) as progress:
        try:
            result = compiler.compile(
                model,
                out,
                recipe=recipe,
                settings=settings,
                calib=calib,
                shape=shapes,
                target_options=pairs(target_options, "--target-option"),
                kv_cache=kv_cache,
                add_kv_cache=add_kv_cache,
                logits=logits,
                opset=opset,
                bundle_ops=bundle_ops,
                jobs=jobs,
                memory_limit=memory_limit,
                verify=verify,
                resume=resume,
                force=force,
                progress=progress,
                **given,
            )
        except GateError as error:
            rejected = getattr(error, "manifest", None)
            if rejected is not None:
                _show(rejected, output)
            raise
    for note in result.manifest.notes:
        if note not in progress.told:
            output.note(note)
    _show(result.manifest, output)
    if not output.json:
        output.note(f"wrote {result.path}; open {result.path / 'report.html'} for the whole account")


def _show(manifest: Any, output: Output) -> None:
    if output.json:
        click.echo(manifest.dumps(), nl=False)
        return
    if output.quiet:
        return
    from onnxslim_llm.report.tables import compile_summary, pass_table

    output.show(compile_summary(manifest))
    if output.verbose:
        output.show(pass_table(manifest.passes))
