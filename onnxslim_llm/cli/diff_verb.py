"""onnxslim-llm diff."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxslim_llm.cli.output import Output, output_options
from onnxslim_llm.cli.params import PATH

if TYPE_CHECKING:
    from onnxslim_llm.report.difference import StructuralDifference
    from onnxslim_llm.verify.layers import LayerComparison, LayerError

__all__ = ["command"]

_LAYERS_SHOWN = 20


@click.command("diff")
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@click.option("--no-run", is_flag=True, help="Only operators and bytes; nothing is run.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Of the runtime; 0: its own choice.")
@output_options
def command(a: Path, b: Path, no_run: bool, threads: int, output: Output) -> None:
    """Compare the models A (the reference) and B: operators, bytes, and the same-named tensors on the same inputs."""
    from onnxslim_llm.cli.progress import TerminalProgress
    from onnxslim_llm.ir.model import open_model, resolve_model_path
    from onnxslim_llm.report.difference import structural_difference

    first, second = resolve_model_path(a), resolve_model_path(b)
    structure = structural_difference(open_model(first), open_model(second))
    layers = None
    if not no_run:
        from onnxslim_llm.verify.layers import compare_layers

        with TerminalProgress(output) as progress:
            progress.stage("compare", None, "inputs")
            layers = compare_layers(
                first,
                second,
                threads=threads,
                progress=lambda done, total: progress.advance(done, f"{done} of {total}"),
            )
    data: dict[str, Any] = {"a": str(first), "b": str(second), "structure": structure.to_json()}
    data["layers"] = layers.to_json() if layers else None
    output.result(data, *([] if output.json else _page(structure, layers, output.verbose)))


def _page(structure: StructuralDifference, layers: LayerComparison | None, verbose: bool) -> list[Any]:
    from onnxslim_llm.report.format import bytes_text, count_text, ratio_text
    from onnxslim_llm.report.tables import plain_table

    ops = [["all nodes", *map(count_text, structure.nodes)]]
    ops += [[op, count_text(x), count_text(y)] for op, (x, y) in structure.ops.items()]
    sizes = [
        [role, bytes_text(x), bytes_text(y), ratio_text(y, x)]
        for role, (x, y) in [*structure.bytes_by_role.items(), ("all weights", structure.weight_bytes)]
    ]
    page: list[Any] = [
        plain_table(["operator", ">A", ">B"], ops),
        plain_table(["role", ">A", ">B", ">ratio"], sizes),
    ]
    versions = [[domain or "ai.onnx", str(x or "–"), str(y or "–")] for domain, (x, y) in structure.opset.items()]
    if versions:
        page.append(plain_table(["opset", ">A", ">B"], versions))
    for side, names in (("inputs", structure.inputs), ("outputs", structure.outputs)):
        if any(names):
            page.append(
                plain_table([f"{side} of one only", "A", "B"], [["", "\n".join(names[0]), "\n".join(names[1])]])
            )
    if layers is not None:
        page.append(_layer_table(layers, verbose))
    return page


def _layer_table(layers: LayerComparison, verbose: bool) -> Any:
    from onnxslim_llm.report.format import figure_text
    from onnxslim_llm.report.tables import plain_table

    different = [layer for layer in layers.layers if layer.max_abs > 0 or layer.nonfinite]
    shown = layers.layers if verbose else different[:_LAYERS_SHOWN]
    if not shown:
        return f"all {len(layers.layers)} tensors of the same name are equal"
    rows: list[list[Any]] = [
        [layer.name, layer.op, _sqnr(layer), figure_text(layer.max_abs), f"{layer.cosine:.6f}"] for layer in shown
    ]
    if len(shown) < len(layers.layers):
        rest = len(different) - len(shown), len(layers.layers) - len(different)
        rows.append([f"and {rest[0]} better, {rest[1]} equal ones (-v)", "", "", "", ""])
    return plain_table(["tensor, worst first", "operator", ">SQNR", ">largest", ">cosine"], rows)


def _sqnr(layer: LayerError) -> str:
    if layer.nonfinite:
        return f"{layer.nonfinite} not finite"
    return "equal" if layer.max_abs == 0 else f"{layer.sqnr_db:.1f} dB"
