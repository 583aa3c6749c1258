"""The plots of a sweep: divergence over bytes and over speed, points on the Pareto front joined."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pygal

from onnxslim_llm.artifact.sweep_record import SweepPoint
from onnxslim_llm.report.drawing import blank_chart, log_ticks, marked, svg
from onnxslim_llm.report.format import bytes_text, figure_text

__all__ = ["LEAST_DIVERGENCE", "front_plot", "speed_plot"]

#: Smaller divergences are drawn here: below, they are rounding errors, and decades of nothing would flatten the rest.
LEAST_DIVERGENCE = 1e-5
_HEIGHT = 420
_MARGIN = 0.06  # decades around the points, at least
_FRONT, _OTHERS = "var(--artifact)", "var(--source)"


def front_plot(points: Sequence[SweepPoint], numbers: dict[str, int]) -> str:
    """Mean KL divergence over bytes, both logarithmic, as SVG text.

    Args:
        points: That were measured.
        numbers: The number of each point of the front, by its name: its label.
    """
    return _plot(points, numbers, "front", lambda p: p.bytes, bytes_text, "bytes", joined=True)


def speed_plot(points: Sequence[SweepPoint], numbers: dict[str, int]) -> str:
    """Mean KL divergence over the decode speed relative to the source's, as SVG text."""
    timed = [point for point in points if point.decode_ratio]
    return _plot(timed, numbers, "speed", lambda p: p.decode_ratio, _times, "decode speed", joined=False)


def _times(ratio: float) -> str:
    return f"{figure_text(ratio, 3)}x"


def _plot(
    points: Sequence[SweepPoint],
    numbers: dict[str, int],
    name: str,
    measure: Callable[[SweepPoint], float | None],
    spelled: Callable[[float], str],
    title: str,
    *,
    joined: bool,
) -> str:
    """Draw the points with `measure` on the x axis."""

    def place(point: SweepPoint) -> tuple[float, float]:
        return math.log10(measure(point) or 1), math.log10(max(point.kld_mean or 0.0, LEAST_DIVERGENCE))

    def dot(point: SweepPoint) -> dict[str, Any]:
        text = f"{point.name}: {spelled(measure(point) or 0)}, mean KL {figure_text(point.kld_mean)}"
        label = str(numbers[point.name]) if point.name in numbers else ""
        return {**marked(place(point), text), "label": label}

    front = sorted((p for p in points if p.name in numbers), key=place)
    others = [p for p in points if p.name not in numbers]
    drawn = blank_chart(
        pygal.XY, height=_HEIGHT, colours=(_OTHERS, _FRONT), dots_size=5, print_labels=True, include_x_axis=False
    )
    xs, ys = zip(*(place(p) for p in points), strict=True)
    drawn.xrange, drawn.range = _range(xs), _range(ys)
    drawn.x_labels, drawn.y_labels = (log_ticks(*span) for span in (drawn.xrange, drawn.range))
    drawn.x_value_formatter = lambda value: spelled(10**value)
    drawn.value_formatter = lambda value: figure_text(10**value, 2)
    drawn.x_title, drawn.y_title = title, "mean KL"
    drawn.add("others", [dot(p) for p in others], stroke=False)
    drawn.add("Pareto front", [dot(p) for p in front], stroke=joined)
    return svg(drawn, name)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The span of an axis: the values, a margin, and enough for two ticks at least."""
    low, high = min(values), max(values)
    margin = max(_MARGIN * (high - low), _MARGIN, (0.4 - (high - low)) / 2)
    return low - margin, high + margin
