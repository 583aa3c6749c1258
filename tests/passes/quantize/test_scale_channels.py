"""`scale_channels`: factors by channel that a quantizer gains from, folded away (AWQ)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformer_models import HEADS, KV_HEADS, SIZE, Habits, assert_same_logits, ids, statistics_of, transformer

from onnxslim_llm.concepts.block_weights import Method, WeightScheme
from onnxslim_llm.custom_ops.quantize import BlockSpec, quantize_tile
from onnxslim_llm.custom_ops.reference import dequantize
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.passes.quantize.codes.columns import columns_of
from onnxslim_llm.passes.quantize.codes.trial import held_error, lost, quickly_coded
from onnxslim_llm.passes.quantize.folding.channel_scales import Columns, best_candidate, candidates
from onnxslim_llm.passes.quantize.folding.fold_scales import fold_scales, tied
from onnxslim_llm.passes.quantize.folding.fold_sites import FoldSite, find_fold_sites
from onnxslim_llm.passes.quantize.quantize_weights import QuantizeWeights
from onnxslim_llm.passes.quantize.scale_channels import ScaleChannels
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Change
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.stats.moments import Moments

Array = np.ndarray[Any, Any]

QUANTIZER = QuantizeWeights(bits=3, block=16, min_elements=0, sensitive=(), method="rtn", lm_head_bits=3)


def _sites(habits: Habits) -> tuple[list[FoldSite], dict[str, str]]:
    change = Change()
    found = find_fold_sites(transformer(habits), change)
    return found, {skip.where: skip.reason for skip in change.skipped}


def _scaled(habits: Habits, folder: Path, quantizer: QuantizeWeights = QUANTIZER, **options: Any) -> Any:
    model = transformer(habits)
    context = Context(statistics=statistics_of(model, habits, folder))
    after = transformer(habits)
    context.following = (quantizer,)
    change = ScaleChannels(**options).apply(after, context)
    return model, after, change, context


# where


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_sites_of_a_transformer(bias: bool, layer_norm: bool) -> None:
    sites, skipped = _sites(Habits(bias=bias, layer_norm=layer_norm))
    kinds = [site.kind for site in sites]
    assert kinds == ["norm", "values", "norm", "product"] * 2 + ["norm"]
    assert [len(site.products) for site in sites] == [3, 1, 2, 1] * 2 + [1]
    assert all(len(site.makers) == 1 + (layer_norm if site.kind == "norm" else bias) for site in sites)
    assert not skipped


def test_query_heads_share_the_values_of_their_key_head() -> None:
    site = next(site for site in _sites(Habits())[0] if site.kind == "values")
    width, group = SIZE // HEADS, HEADS // KV_HEADS
    expected = [(c // width // group) * width + c % width for c in range(SIZE)]
    assert site.channels.tolist() == expected
    factor = tied(site, np.exp(np.random.default_rng(0).standard_normal(SIZE)))
    assert all(len({factor[c] for c in np.flatnonzero(site.channels == m)}) == 1 for m in range(KV_HEADS * width))


def test_a_tied_classifier_is_left() -> None:
    _, skipped = _sites(Habits(tied=True))
    assert list(skipped.values()) == ["'embedding' is used elsewhere, too"]


@pytest.mark.parametrize(
    "habits",
    [Habits(), Habits(bias=True), Habits(layer_norm=True, bias=True), Habits(cache=True), Habits(tied=True, bias=True)],
)
def test_any_factors_leave_the_results(habits: Habits) -> None:
    before, after = transformer(habits), transformer(habits)
    rng = np.random.default_rng(1)
    sites = find_fold_sites(after, Change())
    for site in sites:
        fold_scales(after, Context(), site, tied(site, np.exp(rng.standard_normal(len(site.channels)))))
    assert len(sites) >= 8
    assert_same_logits(before, after, ids(habits))


def test_the_ranges_of_an_int8_cache_follow() -> None:
    habits = Habits(cache=True)
    model = transformer(habits)
    site = next(site for site in find_fold_sites(model, Change()) if site.kind == "values")
    assert site.cache == "present.0.value"
    ranges = {site.cache: np.ones((KV_HEADS, SIZE // HEADS)), "present.0.key": np.ones(3)}
    context = Context(cache_ranges=ranges)
    factor = tied(site, np.linspace(1, 2, SIZE))
    fold_scales(model, context, site, factor)
    assert context.cache_ranges is not None
    for channel, maker in enumerate(site.channels):
        assert context.cache_ranges[site.cache].reshape(-1)[maker] == pytest.approx(1 / factor[channel])
    assert context.cache_ranges["present.0.key"] is ranges["present.0.key"]


# what is searched


@pytest.mark.parametrize("method", ["rtn", "search", "hqq"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_trial_is_what_the_quantizer_does(method: Method, bits: int, symmetric: bool) -> None:
    columns = np.random.default_rng(0).standard_normal((9, 72)).astype(np.float32)
    scheme = WeightScheme(bits, 32, symmetric, method, "float16")
    spec = BlockSpec(bits, 32, symmetric, "float16")
    expected = dequantize(quantize_tile(columns.T, spec, method).buffers).T
    assert np.array_equal(quickly_coded(columns, scheme, np.ones(72)), expected)


def test_the_search_finds_what_a_plain_one_finds() -> None:
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((300, 64)).astype(np.float32) * np.exp(rng.standard_normal(64)).astype(np.float32)
    moments = Moments(64)
    moments.add(rows)
    weights = [rng.standard_normal((20, 64)).astype(np.float32) for _ in range(2)]
    scheme = WeightScheme(3, 16, False, "rtn")
    choices = list(candidates(moments.mean_absolute, weights, 10, lambda factor: factor))
    best, least, plain = best_candidate([Columns(w, scheme, len(w)) for w in weights], moments, iter(choices))

    def error(factor: Array) -> float:
        total = 0.0
        for w in weights:
            coded = quickly_coded((w * factor).astype(np.float32), scheme, np.ones(64)) / factor
            total += float(np.square(rows.astype(np.float64) @ (w - coded).T).sum())
        return total

    errors = [error(choice.factor) for choice in choices]
    assert best is not None
    assert best.factor is choices[int(np.argmin(errors))].factor
    assert least == pytest.approx(min(errors), rel=1e-3)  # float32 products
    assert plain == pytest.approx(error(np.ones(64)), rel=1e-3)
    assert least < plain


def test_channels_that_never_fire_do_no_harm() -> None:
    size = np.zeros(32)
    size[:4] = 1.0
    for choice in candidates(size, [np.ones((3, 32), np.float32)], 4, lambda factor: factor):
        assert np.isfinite(choice.factor).all()
        assert (choice.factor > 0).all()


def test_loss_is_that_of_the_outputs() -> None:
    rng = np.random.default_rng(0)
    rows, change = rng.standard_normal((50, 12)), rng.standard_normal((5, 12)).astype(np.float32)
    assert lost(change, (rows.T @ rows).astype(np.float32)) == pytest.approx(np.square(rows @ change.T).sum(), rel=1e-5)


# what is kept


@pytest.mark.parametrize("method", ["rtn", "search", "calibrated"])
def test_the_error_never_grows(method: Method, tmp_path: Path) -> None:
    habits = Habits()
    quantizer = QuantizeWeights(bits=3, block=16, min_elements=0, sensitive=(), method=method, lm_head_bits=3)
    before, after, change, context = _scaled(habits, tmp_path, quantizer)
    assert change.sites or method == "calibrated"
    assert_same_logits(before, after, ids(habits))
    plain = statistics_of(before, habits, tmp_path)
    schemes = quantizer.plan(transformer(habits), Context())
    assert schemes.keys() == quantizer.plan(after, Context()).keys()
    weights = {t.name: weight_of(t) for t in before.constants()}, {t.name: weight_of(t) for t in after.constants()}
    for site in find_fold_sites(before, Change()):
        total = []
        for store, statistics in zip(weights, (plain, context.statistics), strict=True):
            error = 0.0
            for product in site.products:
                moments = statistics.of_weight(product.name)
                columns = columns_of(store[product.name], product.k_axis, 10**6)
                error += held_error(columns, schemes[product.name], moments)
            total.append(error)
        assert total[1] <= total[0]
        assert (total[1] < total[0]) == (site.where in change.sites)


def test_statistics_are_those_of_the_scaled_model(tmp_path: Path) -> None:
    habits = Habits(outliers=True, bias=True)
    _, after, change, context = _scaled(habits, tmp_path / "a")
    assert change.sites
    fresh = statistics_of(after, habits, tmp_path / "b")
    for site in find_fold_sites(after, Change()):
        moments = [s.of_weight(site.products[0].name).load().fit for s in (context.statistics, fresh)]
        largest = np.abs(moments[1].gram).max()
        assert np.abs(moments[0].gram - moments[1].gram).max() < 1e-5 * largest  # float32 activations
        assert np.abs(moments[0].total - moments[1].total).max() < 1e-5 * moments[1].absolute.max()


def test_sites_that_do_not_gain_say_so(tmp_path: Path) -> None:
    _, after, change, _ = _scaled(Habits(outliers=False), tmp_path, min_gain=0.99)
    assert not change
    reasons = {skip.reason.split(" becomes")[0] for skip in change.skipped}
    assert reasons <= {"on samples that were held out the error", "no factors make the error smaller"}
    untouched = {tensor.name: weight_of(tensor).digest() for tensor in transformer(Habits(outliers=False)).constants()}
    assert {tensor.name: weight_of(tensor).digest() for tensor in after.constants()} == untouched


def test_values_are_left_if_asked(tmp_path: Path) -> None:
    _, _, change, _ = _scaled(Habits(), tmp_path, values=False)
    reasons = [skip.reason for skip in change.skipped]
    assert reasons.count("it is the result of an attention, and `values` is off") == 2


def test_weights_that_stay_floats_are_left(tmp_path: Path) -> None:
    quantizer = QuantizeWeights(bits=3, block=16, min_elements=0, sensitive=(), method="rtn", exclude=("down",))
    _, _, change, _ = _scaled(Habits(), tmp_path, quantizer)
    assert [skip.reason for skip in change.skipped].count("no quantized product reads it") == 2


def test_it_needs_data_and_a_quantizer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there are none"):
        Pipeline([ScaleChannels(), QUANTIZER]).run(transformer(), Context())
    statistics = statistics_of(transformer(), Habits(), tmp_path)
    with pytest.raises(UsageError, match="no quantize_weights follows"):
        Pipeline([ScaleChannels()]).run(transformer(), Context(statistics=statistics))
    with pytest.raises(UsageError, match="grid must be 1 or more"):
        ScaleChannels(grid=0)


def test_in_a_pipeline(tmp_path: Path) -> None:
    statistics = statistics_of(transformer(), Habits(), tmp_path)
    model = transformer()
    records = Pipeline([ScaleChannels(), QUANTIZER]).run(model, Context(statistics=statistics))
    assert [record.name for record in records] == ["scale_channels", "quantize_weights"]
    assert records[0].changed > 0
    assert records[0].nodes[0] == records[0].nodes[1]
    assert all(entry["error_ratio"] < 1 for entry in records[0].detail["inputs"])
