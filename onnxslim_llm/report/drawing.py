"""Charts in the style of the reports, as inline SVG without scripts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pygal.style import Style

__all__ = ["blank_chart", "log_ticks", "marked", "svg"]

_WIDTH = 860
_DIGITS = ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7))
_ENOUGH_TICKS = 4
_ALMOST_ZERO = 1e-12


def marked(value: Any, tooltip: str) -> dict[str, Any]:
    """Return a value as a chart takes it, with a text for who points at it."""
    return {"value": value, "tooltip": tooltip}


def blank_chart(kind: Any, *, height: int, colours: Sequence[str], **options: Any) -> Any:
    """Return a chart of a pygal class in the page's style, without a legend.

    Args:
        kind: The class.
        height: In pixels.
        colours: Of the series.
        options: Of the class's own.
    """
    font = "inherit"
    style = Style(
        background="transparent",
        plot_background="transparent",
        foreground="var(--muted)",
        foreground_strong="var(--text)",
        foreground_subtle="var(--line)",
        guide_stroke_color="var(--line)",
        major_guide_stroke_color="var(--line)",
        guide_stroke_dasharray="2,4",
        major_guide_stroke_dasharray="2,4",
        colors=tuple(colours) * 8,
        value_colors=("var(--text)",) * 64,
        opacity=".9",
        opacity_hover="1",
        transition="0s",
        font_family=font,
        label_font_family=font,
        major_label_font_family=font,
        legend_font_family=font,
        value_font_family=font,
        title_font_family=font,
        label_font_size=13,
        major_label_font_size=13,
        legend_font_size=13,
        value_font_size=12,
        title_font_size=13,
    )
    return kind(
        style=style,
        width=_WIDTH,
        height=height,
        margin=8,
        margin_right=40,  # half of the last label
        js=(),  # the default would fetch a script
        show_legend=False,  # the page has one that wraps
        truncate_label=60,
        max_scale=7,
        rounded_bars=2,
        show_y_guides=True,
        disable_xml_declaration=True,
        **options,
    )


def svg(chart: Any, name: str) -> str:
    """Return the SVG text, without scripts and comments, and with `name` as its id instead of a random one."""
    chart.uuid = name
    chart.add_xml_filter(_without_scripts)
    return str(chart.render(is_unicode=True))


def _without_scripts(root: Any) -> Any:
    for parent in root.iter():
        for child in list(parent):
            if callable(child.tag) or child.tag == "script":  # a comment's tag is a function
                parent.remove(child)
    for child in list(root):
        if child.tag == "title":  # the page has its own headings; a title would be a tooltip of the whole plot
            root.remove(child)
    root.attrib["role"] = "img"
    return root


def log_ticks(low: float, high: float) -> list[float]:
    """Return logarithms of round numbers between two logarithms: 1, 2 and 5 times powers of ten, or some more."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks: list[float] = []
    for digits in _DIGITS:
        # An exact 0 would be drawn as the other axis.
        ticks = [math.log10(digit) + power or _ALMOST_ZERO for power in powers for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= _ENOUGH_TICKS:
            break
    return ticks
