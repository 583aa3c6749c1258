"""docs/portability.md is what its script writes from the measurements beside it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

from onnxslim_llm.consumers.consumer import CONSUMERS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "portability"


def test_the_page_shows_the_measurements() -> None:
    page = runpy.run_path(str(FOLDER / "matrix.py"))["page"]
    results = json.loads((FOLDER / "matrix.json").read_text())
    assert (ROOT / "docs" / "portability.md").read_text() == page(results)


def test_every_runtime_has_a_form_that_runs() -> None:
    """The promise of the page, for both models: a figure that gets lost is noticed."""
    results = json.loads((FOLDER / "matrix.json").read_text())
    for model in results["models"].values():
        running = {report["consumer"] for report in model["reports"] if report["status"] == "runs"}
        exempt = {report["consumer"] for report in model["reports"] if report["status"] == "not for this model"}
        assert {consumer.name for consumer in CONSUMERS} - running - exempt == set()
