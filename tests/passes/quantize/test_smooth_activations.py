"""`smooth_activations`: factors by channel for integers on both sides of a product (SmoothQuant)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformer_models import Habits, assert_same_logits, ids, statistics_of, transformer

from onnxslim_llm.concepts.block_weights import WeightScheme
from onnxslim_llm.errors import UsageError
from onnxslim_llm.passes.quantize.codes.trial import quickly_coded
from onnxslim_llm.passes.quantize.folding.channel_scales import Columns, candidates
from onnxslim_llm.passes.quantize.smooth_activations import SmoothActivations, rounding_error
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.stats.moments import Moments

Array = np.ndarray[Any, Any]

SCHEME = WeightScheme(8, 0, symmetric=True, method="rtn")


def _outlying(seed: int, count: int = 2000) -> Array:
    """Rows with two channels that are 30 times as large as the others."""
    rng = np.random.default_rng(seed)
    scale = np.ones(48)
    scale[[5, 20]] = 30
    return (rng.standard_normal((count, 48)) * scale).astype(np.float32)


def _rounded_product(rows: Array, weight: Array, factor: Array, bits: int) -> Array:
    """What integers make of x W [T, n]: one scale for x / s, one for each column of s W [n, K]."""
    x = rows / factor
    step = 2 * np.abs(x).max() / (2**bits - 1)
    coded = quickly_coded((weight * factor).astype(np.float32), SCHEME, np.ones(48))
    return np.asarray(np.rint(x / step) * step @ coded.T)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_the_error_is_that_of_real_rounding(bits: int, exponent: float) -> None:
    rows = _outlying(0)
    weight = np.random.default_rng(1).standard_normal((40, 48)).astype(np.float32)
    moments = Moments(48)
    moments.add(rows)
    factor = moments.largest**exponent
    predicted = rounding_error([Columns(weight, SCHEME, len(weight))], moments, moments.largest, factor, bits)
    real = np.square(_rounded_product(rows, weight, factor, bits) - rows @ weight.T).sum()
    # Of 4 bits large channels use few codes, so that their errors are not quite evenly spread.
    assert predicted == pytest.approx(real, rel=0.3 if bits == 4 else 0.05)


def test_the_best_exponent_is_the_best_in_reality() -> None:
    rows = _outlying(0)
    weight = np.random.default_rng(1).standard_normal((40, 48)).astype(np.float32)
    moments = Moments(48)
    moments.add(rows)
    columns = [Columns(weight, SCHEME, len(weight))]
    reach = [np.abs(weight).max(axis=0, keepdims=True)]
    choices = list(candidates(moments.largest, reach, 10, lambda factor: factor, always_by_weight=True))
    assert len(choices) == 11
    predicted = [rounding_error(columns, moments, moments.largest, choice.factor, 8) for choice in choices]
    fresh = _outlying(7)
    real = [np.square(_rounded_product(fresh, weight, c.factor, 8) - fresh @ weight.T).sum() for c in choices]
    assert real[int(np.argmin(predicted))] <= 1.1 * min(real)
    plain = np.square(_rounded_product(fresh, weight, np.ones(48), 8) - fresh @ weight.T).sum()
    assert min(real) < plain / 4


def _smoothed(habits: Habits, folder: Path, **options: Any) -> Any:
    before, after = transformer(habits), transformer(habits)
    context = Context(statistics=statistics_of(before, habits, folder))
    change = SmoothActivations(**options).apply(after, context)
    return before, after, change, context


@pytest.mark.parametrize("habits", [Habits(), Habits(layer_norm=True, bias=True), Habits(cache=True, tied=True)])
def test_outliers_shrink_and_the_logits_stay(habits: Habits, tmp_path: Path) -> None:
    before, after, change, context = _smoothed(habits, tmp_path / "a")
    assert len(change.sites) >= 4
    assert all(entry["error_ratio"] < 0.98 for entry in change.detail["inputs"])
    assert_same_logits(before, after, ids(habits))
    assert after.census() == before.census()
    plain, fresh = (statistics_of(model, habits, tmp_path / name) for model, name in ((before, "b"), (after, "c")))
    largest = [s.of_weight("0.gate").load().fit.largest for s in (plain, fresh, context.statistics)]
    assert largest[1].max() / np.median(largest[1]) < largest[0].max() / np.median(largest[0])
    assert np.allclose(largest[1], largest[2], rtol=1e-4)  # float32 activations


def test_sites_that_do_not_gain_say_so(tmp_path: Path) -> None:
    _, _, change, _ = _smoothed(Habits(), tmp_path, min_gain=0.999)
    assert not change
    assert len(change.skipped) == 9
    assert all("the error of both roundings becomes" in skip.reason for skip in change.skipped)


def test_values_are_left_if_asked(tmp_path: Path) -> None:
    _, _, change, _ = _smoothed(Habits(), tmp_path, values=False)
    assert [skip.reason for skip in change.skipped].count("it is the result of an attention, and `values` is off") == 2


@pytest.mark.parametrize("options", [{"grid": 0}, {"activation_bits": 7}, {"weight_bits": 16}])
def test_options(options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        SmoothActivations(**options)


def test_it_needs_data() -> None:
    with pytest.raises(UsageError, match="there are none") as caught:
        Pipeline([SmoothActivations()]).run(transformer(), Context())
    assert "--calib" in caught.value.todo
