"""Terminal tables: what a compile changed, what each pass did, what is in a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from onnxslim_llm.artifact.manifest import Gate, Manifest, PassEntry
from onnxslim_llm.ir.roles import ROLES
from onnxslim_llm.report.format import bytes_text, count_text, figure_text, fusion_text, ratio_text, seconds_text

__all__ = ["compile_summary", "count_table", "gate_lines", "pass_table", "plain_table", "side_by_side", "size_table"]

_BAR_WIDTH = 24
_SHARE_BAR_WIDTH = 10
_OPS_SHOWN = 8
_MIN_WIDTH = 4


def compile_summary(manifest: Manifest) -> RenderableType:
    """The before/after of a compile: sizes by role, nodes, quality, operators that changed, gates."""
    parts: list[RenderableType] = [_before_after(manifest)]
    if fusion_text(manifest.fusion):
        parts.append(Padding(Text("fused      ", style="dim").append(fusion_text(manifest.fusion), "default"), (0, 2)))
    changes = _op_changes(manifest.source.ops, manifest.artifact.ops)
    if changes:
        parts.append(Padding(changes, (0, 2)))
    if manifest.verify is None:
        parts.append(Padding(Text("not verified (--verify off)", style="yellow"), (0, 2)))
    else:
        parts.extend(Padding(line, (0, 2)) for line in gate_lines(manifest.verify.gates))
    return Group(*parts)


def _before_after(m: Manifest) -> Table:
    table = _table("", ">before", ">after", ">ratio", "")
    largest = max([*m.source.bytes_by_role.values(), *m.artifact.bytes_by_role.values()], default=1) or 1
    table.add_row(
        Text("model files", style="bold"),
        bytes_text(m.source.bytes),
        Text(bytes_text(m.artifact.bytes), style="bold"),
        Text(ratio_text(m.artifact.bytes, m.source.bytes), style="bold green"),
    )
    for role in ROLES:
        before, after = m.source.bytes_by_role.get(role), m.artifact.bytes_by_role.get(role)
        if before is not None or after is not None:
            before, after = before or 0, after or 0
            bar = Bar(largest, 0, after, width=_BAR_WIDTH, color="cyan")
            table.add_row(f"  {role}", bytes_text(before), bytes_text(after), ratio_text(after, before), bar)
    nodes = sum(m.source.ops.values()), sum(m.artifact.ops.values())
    table.add_row("nodes", count_text(nodes[0]), count_text(nodes[1]), ratio_text(nodes[1], nodes[0]))
    quality = m.quality
    if quality and quality.ppl_source and quality.ppl_artifact:
        ratio = f"{quality.ppl_artifact / quality.ppl_source:.3f}x"
        table.add_row("perplexity", figure_text(quality.ppl_source), figure_text(quality.ppl_artifact), ratio)
    if quality and quality.kld_mean is not None:
        table.add_row("mean KL (text)", "", figure_text(quality.kld_mean, 3), "")
    elif m.verify and m.verify.kl_mean is not None:
        table.add_row("mean KL", "", figure_text(m.verify.kl_mean, 3), "")
    return table


def _op_changes(before: Mapping[str, int], after: Mapping[str, int]) -> Text | None:
    differences = {op: after.get(op, 0) - before.get(op, 0) for op in {*before, *after}}
    changed = sorted((op for op in differences if differences[op]), key=lambda op: (-abs(differences[op]), op))
    if not changed:
        return None
    text = Text("operators  ", style="dim")
    for op in changed[:_OPS_SHOWN]:
        text.append(f"{differences[op]:+d} ", style="green" if differences[op] < 0 else "cyan")
        text.append(f"{op.rpartition('::')[2]}  ", style="default")
    if len(changed) > _OPS_SHOWN:
        text.append(f"and {len(changed) - _OPS_SHOWN} more", style="dim")
    return text


def gate_lines(gates: Iterable[Gate]) -> list[Text]:
    """One line a gate: mark, figure, limit."""
    lines = []
    for gate in gates:
        sign = {"<=": "≤", ">=": "≥"}.get(gate.comparison, gate.comparison)
        mark, style = ("✓", "green") if gate.ok else ("✗", "bold red")
        line = Text(f"{mark} ", style=style)
        line.append(f"{gate.name} {figure_text(gate.value)} {sign} {figure_text(gate.limit)}", style="default")
        lines.append(line)
    return lines


def pass_table(passes: Sequence[PassEntry]) -> Table:
    """One row a pass: time, changes, nodes and weight bytes afterwards, skipped sites."""
    table = _table("pass", ">time", ">changes", ">nodes", ">weights", ">skipped")
    for entry in passes:
        name = Text(entry.name, style="default" if entry.changed else "dim")
        if entry.rolled_back:
            name.append("  rolled back", style="red")
        table.add_row(
            name,
            seconds_text(entry.seconds),
            count_text(entry.changed),
            count_text(entry.nodes[1]),
            bytes_text(entry.bytes[1]),
            count_text(entry.skipped_count) if entry.skipped_count else "",
        )
    return table


def count_table(title: str, counts: Mapping[str, int]) -> Table:
    """Names with their numbers, most frequent first."""
    table = _table(title, ">number")
    for name, number in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        table.add_row(Text(name), count_text(number))
    return table


def size_table(title: str, sizes: Mapping[str, int]) -> Table:
    """Names with their bytes, share of the whole and a bar, in the order given."""
    table = _table(title, ">bytes", ">share", "")
    total = sum(sizes.values()) or 1
    for name, size in sizes.items():
        bar = Bar(total, 0, size, width=_SHARE_BAR_WIDTH, color="cyan")
        table.add_row(Text(name), bytes_text(size), f"{100 * size / total:.1f} %", bar)
    return table


def side_by_side(*columns: Sequence[RenderableType]) -> Table:
    """Stacks of tables, one stack beside the other."""
    grid = Table.grid(padding=(0, 2))
    grid.add_row(*(Group(*stack) for stack in columns))
    return grid


def plain_table(headers: Sequence[str], rows: Iterable[Sequence[RenderableType]]) -> Table:
    """A table of `rows`. A column whose header begins with '>' is aligned to the right; with '=', it never wraps."""
    table = _table(*headers)
    for row in rows:
        # As Text, because a name may hold brackets, which rich takes for markup.
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def _table(*headers: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=True, header_style="dim", show_header=any(h.strip(">=") for h in headers))
    for header in headers:
        right, whole = header.startswith(">"), header.startswith(("=", ">"))
        justify: Literal["left", "right"] = "right" if right else "left"
        title = header.lstrip(">=")
        table.add_column(title, justify=justify, no_wrap=whole, overflow="fold", min_width=_MIN_WIDTH)
    return table
