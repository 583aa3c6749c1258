"""Tables between two marks of a page: <!-- NAME: begin --> and <!-- NAME: end -->."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["PAGE", "head", "line", "write"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "pruning.md"


def line(cells: Sequence[str]) -> str:
    """Return a row."""
    return "| " + " | ".join(cells) + " |"


def head(cells: Sequence[str]) -> list[str]:
    """Return the two lines that a table begins with."""
    return [line(cells), "|" + "---|" * len(cells)]


def write(page: Path, name: str, lines: Sequence[str]) -> None:
    """Put a table between its marks in a page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = page.read_text(encoding="utf-8")
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise SystemExit(f"{page.name} has no place for the table: {begin} {end}")
    page.write_text("\n".join([before + begin, *lines, end + after]), encoding="utf-8")
