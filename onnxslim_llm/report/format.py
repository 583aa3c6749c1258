"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

__all__ = [
    "bytes_text",
    "count_text",
    "figure_text",
    "fusion_text",
    "percent_text",
    "ratio_text",
    "seconds_text",
    "shape_text",
]

_KINDS = {"norm": "norms"}
_UNITS = ("B", "kB", "MB", "GB", "TB")


def bytes_text(size: float) -> str:
    """1234567 -> '1.23 MB': decimal units, three digits."""
    unit = 0
    while abs(size) >= 999.5 and unit < len(_UNITS) - 1:
        size /= 1000
        unit += 1
    if unit == 0:
        return f"{size:.0f} B"
    digits = 2 if abs(size) < 9.995 else 1 if abs(size) < 99.95 else 0
    return f"{size:.{digits}f} {_UNITS[unit]}"


def count_text(number: int) -> str:
    """12345 -> '12 345'. The space is narrow and does not break."""
    return f"{number:,}".replace(",", "\u202f")


def ratio_text(after: float, before: float) -> str:
    """How large `after` is in terms of `before`: '0.14x'; a dash if that means nothing."""
    return f"{after / before:.2f}x" if before else "–"


def percent_text(share: float | None) -> str:
    """0.1234 -> '12.3 %', with a space that does not break; a dash for None."""
    return "–" if share is None else f"{100 * share:.1f}\u00a0%"


def seconds_text(seconds: float) -> str:
    """0.0123 -> '12 ms', 3.456 -> '3.46 s', 754 -> '12 min 34 s'."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms" if seconds >= 0.00095 or seconds == 0 else "<1 ms"
    if seconds < 99.95:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def figure_text(value: float | None, digits: int = 4) -> str:
    """A measured figure with `digits` significant digits; a dash for None."""
    return "–" if value is None else f"{value:.{digits}g}"


def shape_text(shape: Sequence[int | str | None]) -> str:
    """(1, 'seq', None) -> '1 x seq x ?'; 'scalar' for no dimensions."""
    return " x ".join("?" if size is None else str(size) for size in shape) or "scalar"


class _Fused(Protocol):
    """All sites of one kind, and how many of them are fused."""

    @property
    def kind(self) -> str: ...

    @property
    def sites(self) -> int: ...

    @property
    def fused(self) -> int: ...


def fusion_text(reports: Iterable[_Fused]) -> str:
    """Return "attention 2/2, norms 5/5, rotary 4/4"; kinds without a site are left out."""
    return ", ".join(f"{_KINDS.get(r.kind, r.kind)} {r.fused}/{r.sites}" for r in reports if r.sites)
