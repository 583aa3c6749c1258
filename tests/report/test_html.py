"""report.html is complete, self-contained, and survives hostile names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from report.pages import Page

from onnxslim_llm.artifact.manifest import Manifest
from onnxslim_llm.report.html import render_report


def test_nothing_is_fetched_and_nothing_runs(manifest: Manifest) -> None:
    text = render_report(manifest)
    page = Page(text)
    assert not {"script", "link", "iframe", "img", "object", "embed"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not {"src", "href", "xlink:href", "srcset", "onclick", "onload"} & attributes.keys()
    urls = set(re.findall(r"(?:https?:)?//[\w.]+[^\s\"'<]*", text)) - {"http://www.w3.org/2000/svg"}
    assert not urls
    assert "@import" not in text
    assert "url(" not in text
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_shows_the_figures_of_the_manifest(manifest: Manifest) -> None:
    page = Page(render_report(manifest))
    assert sum(tag == "svg" for tag, _ in page.tags) == 3
    for figure in ("0.15x", "23.2 MB", "3.49 MB", "1.012x", "0.0213", "2 of 2 gates passed", "c" * 64, "51\u202f200"):
        assert figure in page.text
    assert page.text.count("one-dimensional") == 50
    assert "60 left alone" in page.text
    for entry in manifest.passes:
        assert entry.name in page.text


def test_every_weight_is_a_dot_with_its_name(manifest: Manifest) -> None:
    text = render_report(manifest)
    plot = text[text.index('id="chart-errors"') :]
    assert plot[: plot.index("</svg>")].count("<circle") == len(manifest.layers) == 43
    assert "<title>model.layers.3.up_proj.weight: 7.9 %</title>" in text


def test_names_are_text_not_markup(manifest: Manifest) -> None:
    evil = '"><script>alert(1)</script>&<b>'
    manifest.source.path = evil
    manifest.passes[3].skipped[0].where = evil
    manifest.layers[0].name = evil
    manifest.notes.append(evil)
    page = Page(render_report(manifest))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count("alert(1)") >= 4


def test_control_characters_in_names_do_not_break_the_page(manifest: Manifest) -> None:
    manifest.layers[0].name = "bad\x00\x08name"
    Page(render_report(manifest))


def test_a_bare_manifest_renders(manifest: Manifest) -> None:
    """A compile without verification, without passes and without weights."""
    manifest.verify = manifest.quality = None
    manifest.passes, manifest.layers, manifest.notes = [], [], []
    manifest.source.bytes_by_role, manifest.artifact.bytes_by_role = {}, {}
    manifest.source.ops = manifest.artifact.ops = {}
    page = Page(render_report(manifest))
    assert "not verified" in page.text
    assert not any(tag == "svg" for tag, _ in page.tags)


def test_failed_gates_are_told_at_the_top(manifest: Manifest) -> None:
    assert manifest.verify is not None
    manifest.verify.gates[0].ok = False
    assert "1 of 2 gates failed" in Page(render_report(manifest)).text


@pytest.mark.parametrize("error", [0.0, 1e-9, 3.0])
def test_any_error_can_be_drawn(manifest: Manifest, error: float) -> None:
    for layer in manifest.layers:
        layer.relative_error = error
    Page(render_report(manifest))


def test_the_same_manifest_gives_the_same_bytes(manifest: Manifest, tmp_path: Path) -> None:
    manifest.write(tmp_path / "manifest.json")
    code = (
        "import sys; from pathlib import Path; from onnxslim_llm.artifact.manifest import read_manifest\n"
        "from onnxslim_llm.report.html import render_report\n"
        "sys.stdout.buffer.write(render_report(read_manifest(Path(sys.argv[1]))).encode())"
    )
    runs = [subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout == render_report(manifest).encode()


def test_sparse_weights_and_the_break_even(manifest: Manifest) -> None:
    assert "Sparse weights" not in Page(render_report(manifest)).text
    entry = manifest.passes[3].model_copy()
    entry.name, entry.rolled_back = "store_sparse", False
    entry.detail = {
        "tensors": [{"name": "W7", "form": "bitmap, 4 bits", "zeros": 0.5, "dense_bytes": 1000, "sparse_bytes": 790}],
        "break_even": {"coo, float32": 0.6667, "bitmap, 4 bits": 0.25},
    }
    manifest.passes.append(entry)
    text = Page(render_report(manifest)).text
    for figure in ("Sparse weights", "W7", "50.0\u00a0%", "0.79x", "bitmap, 4 bits 25.0\u00a0%"):
        assert figure in text, figure
