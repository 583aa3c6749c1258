"""onnxslim-llm inspect."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxslim_llm.cli.output import Output, output_options
from onnxslim_llm.cli.params import PATH

if TYPE_CHECKING:
    from onnxslim_llm.compiler import Inspection

__all__ = ["command"]

_REASONS_SHOWN = 3
_LEFT_SHOWN = 6


@click.command("inspect")
@click.argument("model", type=PATH)
@click.option("--recipe", metavar="NAME|FILE.toml", help="Whose passes are tried. [default: as `compile`]")
@click.option("--target", metavar="NAME", help="The target of that trial.")
@click.option("--csr", type=PATH, metavar="DIR", help="Write matrices with half zeros or more for scipy, by rows.")
@click.option("--csc", type=PATH, metavar="DIR", help="The same by columns.")
@output_options
def command(
    model: Path, recipe: str | None, target: str | None, csr: Path | None, csc: Path | None, output: Output
) -> None:
    """Tell what is in MODEL: blocks, operators, weights by role and type, and what a recipe would change or not."""
    from onnxslim_llm import compiler
    from onnxslim_llm.compiler.sparse_export import export_sparse

    if csr is not None:
        export_sparse(model, csr, "csr")
    if csc is not None:
        export_sparse(model, csc, "csc")
    given: dict[str, Any] = {} if target is None else {"target": target}
    found = compiler.inspect(model, recipe=recipe, **given)
    output.result(found.to_json(), *([] if output.json else _page(found, output.verbose)))


def _page(found: Inspection, verbose: bool) -> list[Any]:
    from rich.text import Text

    from onnxslim_llm.report.format import bytes_text, count_text, percent_text
    from onnxslim_llm.report.tables import count_table, plain_table, side_by_side, size_table

    opset = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in found.opset.items())
    kind = f"decoder, {found.blocks} blocks" if found.decoder else f"no decoder: {found.why_not_decoder}"
    facts = [
        ["file", found.path],
        ["from", found.producer or "unknown exporter"],
        ["opset", opset],
        ["kind", kind],
        ["nodes", count_text(sum(found.ops.values()))],
        ["weights", bytes_text(found.weight_bytes)],
    ]
    page: list[Any] = [plain_table(["", ""], [[Text(cell) for cell in row] for row in facts])]
    page.append(_ports(found, verbose))
    sizes = [size_table("role", found.bytes_by_role), size_table("type", found.bytes_by_dtype)]
    zeros = [[role, percent_text(share)] for role, share in found.zeros.items() if share > 0]
    if zeros:
        sizes.append(plain_table(["role", ">zeros"], zeros))
    page.append(side_by_side([count_table("operator", found.ops)], sizes))
    if found.unknown_ops:
        page.append(Text(f"operators without a definition, kept as they are: {', '.join(found.unknown_ops)}"))
    page.append(_sites(found, verbose))
    page += _fusion(found, verbose)
    page += [Text(f"note: {note}") for note in found.notes]
    return page


def _ports(found: Inspection, verbose: bool) -> Any:
    """Inputs and outputs; of those that differ in a number only (a KV cache has two a layer) the first tells all."""
    from onnxslim_llm.report.format import shape_text
    from onnxslim_llm.report.tables import plain_table

    rows: list[list[str]] = []
    alike: dict[tuple[str, ...], list[int]] = {}
    for side, ports in (("in", found.inputs), ("out", found.outputs)):
        for port in ports:
            shape = "unknown rank" if port.shape is None else shape_text(port.shape)
            key = (side, re.sub(r"\d+", "#", port.name), port.kind, shape)
            if verbose or key not in alike:
                alike[key] = [len(rows), 0]
                rows.append([side, port.name, port.kind, shape])
            else:
                alike[key][1] += 1
    for row, count in alike.values():
        if count:
            rows[row][1] += f" and {count} alike"
    return plain_table(["", "name", "=type", "shape"], rows)


def _sites(found: Inspection, verbose: bool) -> Any:
    from rich.text import Text

    from onnxslim_llm.report.tables import plain_table

    rows: list[list[Any]] = []
    for site in found.sites:
        reasons: dict[str, int] = {}
        for _, reason in site.skipped:
            reasons[reason] = reasons.get(reason, 0) + 1
        most = sorted(reasons.items(), key=lambda item: -item[1])
        lines = [f"{number} x {reason}" for reason, number in most[: None if verbose else _REASONS_SHOWN]]
        if site.changed or site.skipped:
            rows.append([site.name, str(site.changed), str(len(site.skipped)), Text("\n".join(lines))])
    return plain_table([f"=recipe '{found.recipe}'", ">changes", ">skips", "because"], rows)


def _fusion(found: Inspection, verbose: bool) -> list[Any]:
    """One line for all sites, and what keeps those that the recipe would not fuse."""
    from rich.text import Text

    from onnxslim_llm.report.format import fusion_text
    from onnxslim_llm.report.tables import plain_table

    text = fusion_text(found.fusion)
    if not text:
        return []
    page: list[Any] = [Text(f"fused by recipe '{found.recipe}': {text}")]
    left = [[report.kind, where, reason] for report in found.fusion for where, reason in report.left]
    if left:
        shown = left if verbose else left[:_LEFT_SHOWN]
        page.append(plain_table(["=not fused", "where", "because"], shown))
        if len(left) > len(shown):
            page.append(Text(f"and {len(left) - len(shown)} more: -v lists them"))
    return page
