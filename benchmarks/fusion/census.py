"""What compile makes of every model of the zoo: nodes before and after, what is fused, and the largest difference.

    python benchmarks/fusion/census.py [--family NAME]... [--write]

With `--write` the table goes into docs/fusion.md. Needs the extras `hf` and `genai`; the first run exports all models.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import onnx

import onnxslim_llm as osl

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from zoo.cache import export, package_versions  # noqa: E402
from zoo.census import count_nodes, fused_sites  # noqa: E402
from zoo.equality import compare  # noqa: E402
from zoo.families import FAMILIES, Family, Sites  # noqa: E402

PAGE = ROOT / "docs" / "fusion.md"
_START, _END = "<!-- census: start -->", "<!-- census: end -->"


@dataclass(frozen=True)
class Row:
    """One file of one export; `failure` is the exporter's message if there is none."""

    family: Family
    exporter: str
    part: str
    before: int = 0
    after: int = 0
    fused: Sites | None = None
    max_abs: float = 0.0
    greedy: int = 0
    greedy_match: float = 1.0
    failure: str = ""


def rows(families: list[Family]) -> Iterator[Row]:
    """Compile and compare all files of `families`."""
    for family in families:
        for exporter in family.exporters:
            made = export(family, exporter)
            if made.failure:
                yield Row(family, exporter, "", failure=made.failure)
                continue
            for part in family.parts(exporter):
                yield _row(family, exporter, part, made.path(part))


def _row(family: Family, exporter: str, part: str, source: Path) -> Row:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "artifact"
        osl.compile(source, folder, recipe="safe", target="ort-cpu", verify="off")
        before, after = (onnx.load(path, load_external_data=False) for path in (source, folder / "model.onnx"))
        same = compare(source, folder / "model.onnx")
    return Row(
        family,
        exporter,
        part,
        count_nodes(before),
        count_nodes(after),
        fused_sites(after),
        same.max_abs,
        same.greedy,
        same.greedy_match,
    )


def table(found: list[Row]) -> str:
    """Markdown of all rows, and of the exports that do not exist."""
    lines = [
        "| model | exporter | nodes | attention | norms | rotary | max abs. difference | greedy tokens equal |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        if row.fused is None:
            continue
        sites = row.family.sites(row.part)
        name = row.family.name if row.part == "model" else f"{row.family.name}, {row.part}"
        counts = " | ".join(
            f"{got} of {of}" if of else "–"
            for got, of in (
                (row.fused.attentions, sites.attentions),
                (row.fused.norms, sites.norms),
                (row.fused.rotaries, sites.rotaries),
            )
        )
        text = f"{row.greedy_match:.0%} of {row.greedy}" if row.greedy else "–"
        lines.append(
            f"| {name} | {row.exporter} | {row.before} → {row.after} | {counts} | {row.max_abs:.1e} | {text} |"
        )
    lines += ["", "What the exporters refuse:", "", "| model | exporter | message |", "|---|---|---|"]
    lines += [f"| {r.family.name} | {r.exporter} | {r.failure.replace('|', '/')} |" for r in found if r.failure]
    return "\n".join(lines)


def main() -> None:
    """Print the table, or write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=[f.name for f in FAMILIES], help="only these")
    parser.add_argument("--write", action="store_true", help="replace the table in docs/fusion.md")
    arguments = parser.parse_args()
    if arguments.write and arguments.family:
        parser.error("--write needs all families")
    chosen = [f for f in FAMILIES if not arguments.family or f.name in arguments.family]
    found = []
    for row in rows(chosen):
        print(row.family.name, row.exporter, row.part, row.failure or f"{row.before} -> {row.after}", file=sys.stderr)
        found.append(row)
    text = table(found)
    if not arguments.write:
        print(text)
        return
    page = PAGE.read_text(encoding="utf-8")
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items() if version)
    block = f"{_START}\nMeasured on {date.today()} with {versions}.\n\n{text}\n{_END}"
    PAGE.write_text(page[: page.index(_START)] + block + page[page.index(_END) + len(_END) :], encoding="utf-8")


if __name__ == "__main__":
    main()
