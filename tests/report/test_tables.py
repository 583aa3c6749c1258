"""The terminal tables show the manifest's figures, also in a narrow terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from onnxslim_llm.artifact.manifest import Manifest
from onnxslim_llm.report.tables import compile_summary, pass_table, size_table


def shown(renderable: object, width: int = 100) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=False).print(renderable)
    return stream.getvalue()


def test_summary_has_sizes_nodes_quality_operators_and_gates(manifest: Manifest) -> None:
    text = shown(compile_summary(manifest))
    row = next(line for line in text.splitlines() if "model files" in line)
    assert row.split() == ["model", "files", "23.2", "MB", "3.49", "MB", "0.15x"]
    assert ["nodes", "157", "86", "0.55x"] in [line.split() for line in text.splitlines()]
    assert ["perplexity", "4.211", "4.262", "1.012x"] in [line.split() for line in text.splitlines()]
    assert "-49 MatMul" in text
    assert "+43 MatMulNBits" in text
    assert "✓ kl_mean 0.0213 ≤ 0.05" in text
    assert "✓ cosine 0.9962 ≥ 0.98" in text


def test_a_failed_gate_is_marked(manifest: Manifest) -> None:
    assert manifest.verify is not None
    manifest.verify.gates[0].ok = False
    assert "✗ kl_mean" in shown(compile_summary(manifest))


def test_an_unverified_compile_says_so(manifest: Manifest) -> None:
    manifest.verify = None
    assert "not verified" in shown(compile_summary(manifest))


def test_pass_table_marks_what_was_rolled_back(manifest: Manifest) -> None:
    manifest.passes[2].rolled_back = True
    text = shown(pass_table(manifest.passes))
    assert [line.split()[0] for line in text.splitlines() if "_" in line] == [p.name for p in manifest.passes]
    assert "rolled back" in next(line for line in text.splitlines() if "deduplicate" in line)


def test_shares_add_up(manifest: Manifest) -> None:
    lines = [line.split() for line in shown(size_table("role", {"a": 750, "b": 250})).splitlines() if "%" in line]
    assert [line[:5] for line in lines] == [["a", "750", "B", "75.0", "%"], ["b", "250", "B", "25.0", "%"]]


@pytest.mark.parametrize("width", [40, 60, 200])
def test_any_width_renders(manifest: Manifest, width: int) -> None:
    assert all(len(line) <= width for line in shown(compile_summary(manifest), width).splitlines())
