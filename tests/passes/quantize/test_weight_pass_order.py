"""The legal order of the passes that change weights, and that a chain of them computes what it should."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from fusion_checks import run_all
from transformer_models import Habits, assert_same_logits, ids, statistics_of, transformer

from onnxslim_llm.errors import UsageError
from onnxslim_llm.passes import PASSES
from onnxslim_llm.passes.quantize.quantize_weights import QuantizeWeights
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.rewrite.stage import Stage

#: In legal order.
CHAIN = ["smooth_activations", "scale_channels", "rotate_residual", "quantize_weights", "correct_biases"]


def test_stages() -> None:
    stages = {step.name: step.stage for step in PASSES if step.stage is not None}
    assert {name: stages[name] for name in CHAIN} == {
        "smooth_activations": Stage.FOLD,
        "scale_channels": Stage.FOLD,
        "rotate_residual": Stage.ROTATE,
        "quantize_weights": Stage.QUANTIZE,
        "correct_biases": Stage.COMPENSATE,
    }


@pytest.mark.parametrize(("earlier", "later"), [*pairwise(CHAIN[1:]), ("scale_channels", "correct_biases")])
def test_the_other_way_round_is_refused_before_anything_is_done(earlier: str, later: str) -> None:
    model = transformer()
    before = model.to_proto().SerializeToString(deterministic=True)
    with pytest.raises(UsageError, match=f"'{earlier}' cannot come after '{later}'"):
        Pipeline(f"{later}, {earlier}").run(model, Context())
    assert model.to_proto().SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("habits", [Habits(), Habits(layer_norm=True, bias=True), Habits(tied=True, cache=True)])
def test_all_lossless_steps_together_leave_the_logits(habits: Habits, tmp_path: Path) -> None:
    before, after = transformer(habits), transformer(habits)
    context = Context(statistics=statistics_of(before, habits, tmp_path / "a"))
    steps = "smooth_activations, scale_channels, rotate_residual{only_if_better=false}"
    pipeline = Pipeline(f"{steps}, quantize_weights{{bits=3, block=16, min_elements=0, method=search}}")
    changed = 0
    for index, step in enumerate(pipeline.passes[:-1]):
        context.following = pipeline.passes[index + 1 :]
        changed += len(step.apply(after, context).sites)
    assert changed >= 3
    assert_same_logits(before, after, ids(habits))
    fresh = statistics_of(after, habits, tmp_path / "b")
    for tap in fresh.taps:
        known = context.statistics.of_weight(tap.weights[0]) if context.statistics is not None else None
        if known is not None:
            old, new = (stored.load().fit for stored in (known, fresh.of_weight(tap.weights[0])))  # type: ignore[union-attr]
            assert np.abs(old.gram - new.gram).max() < 1e-4 * np.abs(new.gram).max(), tap.weights


def test_the_whole_chain(tmp_path: Path) -> None:
    habits = Habits(bias=True, heavy=True)
    logits = []
    for steps in ("", "scale_channels, rotate_residual, ", "smooth_activations, scale_channels, rotate_residual, "):
        model = transformer(habits)
        context = Context(statistics=statistics_of(model, habits, tmp_path / "a"))
        quantizer = "quantize_weights{bits=4, block=16, min_elements=0, sensitive=[], method=calibrated}"
        records = Pipeline(f"{steps}{quantizer}, correct_biases").run(model, context)
        assert all(record.changed for record in records[-2:])
        logits.append(run_all(model.to_proto(), ids(habits))["logits"])
    exact = run_all(transformer(habits).to_proto(), ids(habits))["logits"]
    errors = [float(np.square(each - exact).mean()) for each in logits]
    assert errors[1] < errors[0]  # large weights: rotated, they are coded better


def test_quantized_weights_are_left_by_all(tmp_path: Path) -> None:
    habits = Habits()
    model = transformer(habits)
    context = Context(statistics=statistics_of(model, habits, tmp_path))
    quantizer = QuantizeWeights(bits=4, block=16, min_elements=0)
    Pipeline([quantizer]).run(model, context)
    # A second recipe on the artifact finds nothing to fold, and says why.
    records = Pipeline("scale_channels, rotate_residual, quantize_weights{min_elements=0}").run(model, context)
    assert [record.changed for record in records] == [0, 0, 0]
    assert any(
        "writes to the residual stream" in skip.reason or "embedding" in skip.reason for skip in records[1].skipped
    )
