"""report.html of a sweep: the Pareto front and every point, rendered from sweep.json alone."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from markupsafe import Markup

from onnxslim_llm.artifact.sweep_record import SweepRecord, setting_text
from onnxslim_llm.report.format import bytes_text, count_text, figure_text
from onnxslim_llm.report.page import render_page
from onnxslim_llm.report.sweep_plot import LEAST_DIVERGENCE, front_plot, speed_plot

__all__ = ["render_sweep"]


def render_sweep(record: SweepRecord) -> str:
    """The text of report.html for a sweep."""
    return render_page("sweep", {"r": record, **_content(record)}, {"times": _times, "setting": setting_text})


def _content(record: SweepRecord) -> dict[str, Any]:
    measured = [p for p in record.points if p.status == "ok"]
    front = sorted((p for p in measured if p.pareto), key=lambda p: p.bytes or 0)
    numbers = {point.name: number for number, point in enumerate(front, 1)}
    timed = [point for point in measured if point.decode_ratio]
    others = sorted((p for p in measured if not p.pareto), key=lambda p: (p.bytes or 0, p.kld_mean or 0))
    return {
        "title": "/".join(PurePath(record.source.path).parts[-2:]),
        "text_name": PurePath(record.text.path).name,
        "front": front,
        "others": others,
        "failed": [point for point in record.points if point.status == "failed"],
        "measured": measured,
        "numbers": numbers,
        "least": figure_text(LEAST_DIVERGENCE),
        "plots": {
            "front": Markup(front_plot(measured, numbers)) if measured else "",
            "speed": Markup(speed_plot(timed, numbers)) if timed else "",
        },
        "environment": _environment(record),
    }


def _times(ratio: float | None, digits: int = 2) -> str:
    return "–" if ratio is None else f"{ratio:.{digits}f}x"


def _environment(record: SweepRecord) -> list[tuple[str, str]]:
    e = record.environment
    return [
        ("Source", bytes_text(record.source.bytes)),
        ("Source SHA-256", record.source.sha256[:16] + "…"),
        ("Text", f"{PurePath(record.text.path).name}, {count_text(record.text.tokens)} tokens"),
        ("Window", count_text(record.text.window)),
        ("Calibration", record.calibration or "none"),
        ("onnxruntime", e.onnxruntime or "not installed"),
        ("CPU", e.cpu or e.platform),
        ("Threads", str(e.threads)),
    ]
