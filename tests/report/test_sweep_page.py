"""The page of a sweep shows every point, marks the front, and loads nothing."""

from __future__ import annotations

import re

import pytest
from report.pages import Page

from onnxslim_llm.artifact.manifest import Environment, Tool
from onnxslim_llm.artifact.sweep_record import SweepPoint, SweepRecord, SweepSource, SweepText, sweep_csv
from onnxslim_llm.report.sweep_page import render_sweep


def point(name: str, size: int, divergence: float, **more: object) -> SweepPoint:
    return SweepPoint.model_validate(
        {
            "name": name,
            "key": name,
            "base": "int4",
            "settings": {"quantize_weights.bits": 4},
            "status": "ok",
            "bytes": size,
            "bytes_ratio": size / 10_000_000,
            "kld_mean": divergence,
            "ppl_ratio": 1.0 + divergence,
            "top1_agreement": 0.9,
            "decode_ratio": 2.5,
            "prefill_ratio": 0.8,
            "compile_seconds": 1.5,
            "recipe_file": f"recipes/{name}.toml",
            **more,
        }
    )


@pytest.fixture
def record() -> SweepRecord:
    points = [
        point("beaten", 3_000_000, 0.5),
        point("small", 1_000_000, 0.9),
        point("best", 3_000_000, 0.05),
        point("exact", 9_000_000, 0.0, decode_ratio=None),
        SweepPoint(
            name="bad", key="bad", base="int4", settings={}, status="failed", reason="3 bits <cannot> be stored"
        ),
    ]
    found = SweepRecord(
        tool=Tool(version="0.1.0"),
        created="2026-11-21T05:00:00Z",
        source=SweepSource(path="models/llama/model.onnx", sha256="a" * 64, bytes=10_000_000),
        target="ort-cpu",
        text=SweepText(path="heldout.txt", tokens=1024, token_sha256="b" * 64, window=512),
        environment=Environment(python="3.11", onnxruntime="1.31.1", cpu_features=[], threads=2),
        points=points,
    )
    found.mark_front()
    return found


def test_the_front_is_what_no_point_beats(record: SweepRecord) -> None:
    assert [p.name for p in record.points if p.pareto] == ["small", "best", "exact"]
    record.points.append(point("twin", 3_000_000, 0.05))
    record.mark_front()
    assert [p.name for p in record.points if p.pareto] == ["small", "best", "exact"]


def test_every_point_is_a_dot_and_a_row(record: SweepRecord) -> None:
    text = render_sweep(record)
    page = Page(text)
    plot = text[text.index('id="chart-front"') :]
    assert plot[: plot.index("</svg>")].count("<circle") == 4
    speed = text[text.index('id="chart-speed"') :]
    assert speed[: speed.index("</svg>")].count("<circle") == 3
    assert "<title>best: 3.00 MB, mean KL 0.05</title>" in text
    for figure in ("4 compiles", "1 failed", "3 bits <cannot> be stored", "0.300x", "1.0500x", "recipes/best.toml"):
        assert figure in page.text
    assert "recipes/bad.toml" not in page.text


def test_nothing_is_fetched_and_nothing_runs(record: SweepRecord) -> None:
    record.points[0].name = record.points[0].base = '"><script>alert(1)</script>'
    text = render_sweep(record)
    page = Page(text)
    assert not {"script", "link", "iframe", "img", "object", "embed"} & {tag for tag, _ in page.tags}
    assert not set(re.findall(r"(?:https?:)?//[\w.]+[^\s\"'<]*", text)) - {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("left", [0, 1])
def test_a_page_of_few_points_renders(record: SweepRecord, left: int) -> None:
    record.points = record.points[:left]
    record.mark_front()
    assert sum(tag == "svg" for tag, _ in Page(render_sweep(record)).tags) == 2 * left


def test_the_table_has_a_column_for_each_option_and_leaves_out_what_is_unknown(record: SweepRecord) -> None:
    record.points[0].settings["prune_weights.bits"] = True
    lines = sweep_csv(record).splitlines()
    assert lines[0].startswith("point,recipe,quantize_weights.bits,prune_weights.bits,status,bytes,")
    assert lines[1].startswith("beaten,int4,4,true,ok,3000000,0.3,,1.5,0.5,,0.9,,,,0.8,2.5,1.5,false,")
    assert lines[5] == "bad,int4,,,failed,,,,,,,,,,,,,,false,3 bits <cannot> be stored"
    assert record.axes["prune_weights.bits"] == "prune_weights.bits"
