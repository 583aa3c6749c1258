"""The reference pages are what the docstrings say, and every pass is documented as the house rules want it."""

from __future__ import annotations

import inspect
import runpy
from pathlib import Path

import pytest

from onnxslim_llm.passes import PASSES
from onnxslim_llm.rewrite.passes import Pass

ROOT = Path(__file__).resolve().parents[2]


PAGES = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]


@pytest.mark.parametrize("name", PAGES)
def test_the_reference_pages_are_up_to_date(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == PAGES[name](), "run: python docs/generate.py"


@pytest.mark.parametrize("kind", PASSES, ids=lambda p: p.name)
def test_a_pass_shows_before_after_and_when_it_skips(kind: type[Pass]) -> None:
    text = inspect.cleandoc(kind.__doc__ or "")
    assert kind.summary().endswith(".")
    for part in ("Before:", "After:", "Skips when:"):
        assert part in text, f"{kind.name}: the docstring lacks '{part}'"


def test_names_and_groups_follow_the_files() -> None:
    for kind in PASSES:
        module = kind.__module__.split(".")
        assert module[-1] == kind.name, f"{kind.name} lives in {module[-1]}.py"
        assert module[module.index("passes") + 1] == kind.group
    assert len({kind.name for kind in PASSES}) == len(PASSES)
