"""The Before and After of every pass's docstring are true, and their "Skips when" is there."""

from __future__ import annotations

import inspect
import re

import pytest
from cleanup_graphs import apply, assert_isomorphic, graph, model_of

from onnxslim_llm.passes import PASSES
from onnxslim_llm.passes.cleanup.order import CLEANUP
from onnxslim_llm.passes.cleanup.raise_ir_version import RaiseIrVersion
from onnxslim_llm.passes.cleanup.tie_weights import TieWeights
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Pass

CLEANUP_PASSES = [kind for kind in PASSES if kind.group == "cleanup"]


def section(kind: type[Pass], title: str) -> str:
    text = inspect.getdoc(kind) or ""
    match = re.search(rf"^{title}:\n((?:    .*\n|\n)*)", text + "\n", re.MULTILINE)
    assert match, f"{kind.name} has no section '{title}'"
    return inspect.cleandoc(match[1])


@pytest.mark.parametrize("kind", CLEANUP_PASSES, ids=lambda kind: kind.name)
def test_before_becomes_after(kind: type[Pass]) -> None:
    before, after = graph(section(kind, "Before")), graph(section(kind, "After"))
    # The example of tie_weights is smaller than what is worth tying.
    step = TieWeights(min_bytes=0) if kind is TieWeights else kind()
    if kind is RaiseIrVersion:  # the one that changes which inputs are listed
        model = model_of(before)
        change = step.apply(model, Context())
        done = model.to_proto()
    else:
        done, change = apply(step, before)
    assert change
    assert_isomorphic(done, after)


@pytest.mark.parametrize("kind", CLEANUP_PASSES, ids=lambda kind: kind.name)
def test_it_is_said_when_the_pass_skips(kind: type[Pass]) -> None:
    assert section(kind, "Skips when").startswith("- ")
    assert kind.summary().endswith(".")


def test_the_order_names_passes_of_the_group() -> None:
    assert set(CLEANUP) < {kind.name for kind in CLEANUP_PASSES}
