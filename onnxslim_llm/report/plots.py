"""The report's plots as inline SVG. Colours are CSS variables of the page, so they follow its light or dark scheme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pygal

from onnxslim_llm.artifact.manifest import LayerError, PassEntry
from onnxslim_llm.ir.roles import ROLES
from onnxslim_llm.report.drawing import blank_chart, log_ticks, marked, svg
from onnxslim_llm.report.format import bytes_text, figure_text, seconds_text

__all__ = ["ROLE_COLOURS", "bytes_plot", "error_plot", "output_error_plot", "time_plot"]

ROLE_COLOURS = {role: f"var(--{role})" for role in ROLES}
"""Colour of each role in the plots; the page's legend uses the same."""

_ROW = 26  # pixels for one bar with its gap
_AXIS = 40  # pixels below the bars


def bytes_plot(before: dict[str, int], after: dict[str, int]) -> str:
    """Bytes by role in the source and in the artifact, as SVG text."""
    roles = [role for role in ROLES if role in before or role in after][::-1]  # the first role on top
    chart = blank_chart(
        pygal.HorizontalBar, height=_AXIS + 2 * _ROW * len(roles), colours=("var(--source)", "var(--artifact)")
    )
    chart.x_labels = roles
    chart.value_formatter = bytes_text
    for name, sizes in (("source", before), ("artifact", after)):
        values = [sizes.get(role, 0) for role in roles]
        chart.add(name, [marked(v, f"{r}, {name}: {bytes_text(v)}") for r, v in zip(roles, values, strict=True)])
    return svg(chart, "bytes")


def error_plot(layers: Sequence[LayerError]) -> str:
    """The relative error of each compressed weight in graph order, coloured by role, as SVG text."""
    points: dict[str, list[dict[str, Any]]] = {}
    for index, layer in enumerate(layers, 1):
        if layer.relative_error is not None:
            text = f"{layer.name}: {figure_text(100 * layer.relative_error, 3)} %"
            points.setdefault(layer.role, []).append(marked((index, 100 * layer.relative_error), text))
    roles = [role for role in ROLES if role in points]
    colours = [ROLE_COLOURS[role] for role in roles]
    chart = blank_chart(pygal.XY, height=320, colours=colours, stroke=False, dots_size=3.5)
    chart.value_formatter = lambda value: f"{value:g} %"
    chart.x_value_formatter = lambda value: f"{value:.0f}" if value == int(value) else ""
    top = max((point["value"][1] for role in roles for point in points[role]), default=1.0)
    chart.range = (0, top * 1.05 or 1.0)
    chart.xrange = (0, len(layers) + 1)
    for role in roles:
        chart.add(role, points[role])
    return svg(chart, "errors")


def output_error_plot(points: Sequence[tuple[str, str, float, float]]) -> str:
    """Predicted against measured relative errors of outputs, both axes logarithmic, as SVG text.

    Args:
        points: (name, role, predicted, measured), both positive shares.
    """
    by_role: dict[str, list[dict[str, Any]]] = {}
    for name, role, predicted, measured in points:
        text = f"{name}: predicted {figure_text(100 * predicted, 2)} %, measured {figure_text(100 * measured, 2)} %"
        by_role.setdefault(role, []).append(marked((math.log10(predicted), math.log10(measured)), text))
    roles = [role for role in ROLES if role in by_role]
    colours = [ROLE_COLOURS[role] for role in roles]
    chart = blank_chart(pygal.XY, height=360, colours=colours, stroke=False, dots_size=3.5)
    chart.value_formatter = chart.x_value_formatter = lambda value: f"{figure_text(100 * 10**value, 2)} %"
    spread = [_decades([point[2] for point in points]), _decades([point[3] for point in points])]
    chart.xrange, chart.range = spread[0], spread[1]
    chart.x_labels, chart.y_labels = (log_ticks(low, high) for low, high in spread)
    chart.x_title, chart.y_title = "predicted", "measured"
    for role in roles:
        chart.add(role, by_role[role])
    return svg(chart, "outputs")


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Logarithms of the smallest and largest value, with a margin."""
    return math.log10(min(values)) - 0.1, math.log10(max(values)) + 0.1


def time_plot(passes: Sequence[PassEntry]) -> str:
    """Seconds of each pass in the order of the pipeline, as SVG text."""
    rows = list(passes)[::-1]
    chart = blank_chart(pygal.HorizontalBar, height=_AXIS + _ROW * len(rows), colours=("var(--artifact)",))
    chart.x_labels = [entry.name for entry in rows]
    in_seconds = max((entry.seconds for entry in rows), default=0.0) >= 1
    chart.value_formatter = lambda value: f"{value:g} s" if in_seconds else f"{1000 * value:g} ms"
    chart.add("time", [marked(p.seconds, f"{p.name}: {seconds_text(p.seconds)}, {p.changed} changes") for p in rows])
    return svg(chart, "times")
