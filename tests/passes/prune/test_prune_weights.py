"""`prune_weights` on small models: which weights, how sparse, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from block_models import TIED, VOCAB, WIDTH, model_of, proto, weights

from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.gradients.source import GradientSource
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.passes.prune.prune_weights import PruneWeights
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.stats.calibration import TensorCalibration
from onnxslim_llm.stats.collect import collect
from onnxslim_llm.stats.statistics import Gain, Statistics

K, N = 128, 96
HEAD = "it is an embedding or makes the logits: every zero would show in every token"
TWO = """
    agraph (float[m, 128] x) => (float[m, 96] y) {
        a = MatMul (x, W)
        b = MatMul (a, V)
        t = Tanh (b)
        y = MatMul (t, head)
    }
"""


def two() -> onnx.ModelProto:
    """Two products in a row, and one that is left alone since it makes the output."""
    return proto(TWO, W=weights(0, K, N), V=weights(1, N, N) * np.float32(0.1), head=weights(2, N, N))


def rows(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(8, K)) * np.linspace(0.1, 3, K)
    return (rng.normal(size=(100, 8)) @ mixing + rng.normal(size=(100, K))).astype(np.float32)


@pytest.fixture
def statistics(tmp_path: Path) -> Statistics:
    path = tmp_path / "model.onnx"
    onnx.save(two(), path)
    data = TensorCalibration(tuple({"x": rows(seed)} for seed in range(10)))
    return collect(path, "m", data, tmp_path / "statistics")[0]


def pruned(
    step: PruneWeights, statistics: Statistics | None = None, gradients: GradientSource | None = None
) -> dict[str, np.ndarray]:
    model = model_of(two())
    Pipeline([step]).run(model, Context(statistics=statistics, gradients=gradients))
    return {name: weight_of(tensor).load() for name, tensor in model.graph.tensors().items() if name in ("W", "V")}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_the_sparsity_is_what_was_asked_for(statistics: Statistics, method: str, sparsity: float) -> None:
    for weight in pruned(PruneWeights(sparsity, method=method), statistics).values():  # type: ignore[arg-type]
        # Columns and pieces of rows have whole numbers of zeros: half a weight of 96 rows at most.
        assert abs((weight == 0).mean() - sparsity) <= 0.5 / N


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_two_of_four(statistics: Statistics, method: str) -> None:
    for weight in pruned(PruneWeights(pattern="2:4", method=method), statistics).values():  # type: ignore[arg-type]
        assert ((weight != 0).reshape(-1, 4, weight.shape[1]).sum(axis=1) == 2).all()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_methods_that_know_more_lose_less_on_rows_never_seen(statistics: Statistics, pattern: str) -> None:
    x, exact = rows(99), weights(0, K, N)

    def error(method: str, refit: bool) -> float:
        step = PruneWeights(pattern=pattern, method=method, refit=refit)  # type: ignore[arg-type]
        return float(np.square(x @ (exact - pruned(step, statistics)["W"])).sum())

    plain = [error(method, refit=False) for method in ("magnitude", "wanda", "sparsegpt")]
    fitted = [error(method, refit=True) for method in ("magnitude", "wanda", "sparsegpt")]
    assert plain[0] > plain[1] > plain[2]
    assert fitted[0] > fitted[1]
    assert all(f < p for f, p in zip(fitted, plain, strict=True))


def test_weights_compete_within_the_matrix_or_as_wandas_authors_have_it_within_columns(statistics: Statistics) -> None:
    by_column = pruned(PruneWeights(0.5, method="wanda", refit=False, compare="column"), statistics)["W"]
    assert ((by_column == 0).sum(axis=0) == K // 2).all()
    exact, mean_square = (
        weights(0, K, N),
        np.square(np.concatenate([rows(s) for s in range(10) if s % 5 != 1])).mean(axis=0),
    )
    assert ((exact == 0) <= (by_column == 0)).all()
    scores = np.abs(exact) * np.sqrt(mean_square)[:, None]
    for column in range(N):
        kept = by_column[:, column] != 0
        assert scores[kept, column].min() >= scores[~kept, column].max()
    by_matrix = pruned(PruneWeights(0.5, method="wanda", refit=False), statistics)["W"]
    assert scores[by_matrix != 0].min() >= scores[by_matrix == 0].max()
    assert (by_matrix == 0).sum() == K * N // 2


@pytest.fixture
def gradients(tmp_path: Path) -> GradientSource:
    pytest.importorskip("torch")
    from onnxslim_llm.gradients.scorer import GradientScorer

    return GradientScorer(lambda session: ({"x": rows(seed)} for seed in range(10)), tmp_path / "gradients", threads=1)


@pytest.mark.parametrize(("method", "figure", "power"), [("taylor", "absolute", 1), ("fisher", "squared", 2)])
def test_gradients_choose_the_zeros(
    statistics: Statistics, gradients: GradientSource, method: Any, figure: Any, power: int
) -> None:
    figures = gradients.figures(model_of(two()), ["W", "V"], figure)
    found = pruned(PruneWeights(0.5, method=method, refit=False), statistics, gradients)
    for name, exact in (("W", weights(0, K, N)), ("V", weights(1, N, N) * np.float32(0.1))):
        costs = np.abs(exact) ** power * figures[name].view()
        kept = found[name] != 0
        assert kept.sum() == kept.size // 2
        assert costs[kept].min() >= costs[~kept].max() * (1 - 1e-5)  # the order of products that are rounded


def test_costs_in_nats_share_out_the_zeros(statistics: Statistics, gradients: GradientSource) -> None:
    for method in ("fisher", "wanda"):
        known = replace(statistics, gains={"W": Gain(1.0, 1.0), "V": Gain(1e-4, 1.0)})
        step = PruneWeights(0.5, method=method, allocation="sensitivity", refit=False)  # type: ignore[arg-type]
        assert step.wants_gains == (method == "wanda")
        found = pruned(step, known, gradients)
        zeros = sum(int((w == 0).sum()) for w in found.values())
        assert abs(zeros / sum(w.size for w in found.values()) - 0.5) <= 1 / N
        if method == "wanda":  # zeros cost next to nothing in V
            assert (found["V"] == 0).mean() > 0.6
            assert (found["W"] == 0).mean() < 0.45


def test_gradients_need_a_compile_and_a_rule_for_every_operator(
    statistics: Statistics, gradients: GradientSource
) -> None:
    with pytest.raises(UsageError, match="method=fisher needs gradients of the model's answer"):
        pruned(PruneWeights(method="fisher"), statistics)
    changed = model_of(two())
    next(node for node in changed.graph.nodes if node.op == "Tanh").op = "Hardmax"
    with pytest.raises(ModelError, match="Hardmax has no gradient here"):
        Pipeline([PruneWeights(method="taylor")]).run(changed, Context(statistics=statistics, gradients=gradients))
    (record,) = Pipeline([PruneWeights(method="wanda")]).run(changed, Context(statistics=statistics))
    assert record.changed == 2


def test_a_schedule_ends_at_the_same_sparsity(statistics: Statistics) -> None:
    weight = pruned(PruneWeights(0.7, steps=4), statistics)["W"]
    assert abs((weight == 0).mean() - 0.7) <= 0.5 / N


def test_a_limit_stops_before_it_is_exceeded(statistics: Statistics) -> None:
    x, exact = rows(99), weights(0, K, N)
    free = pruned(PruneWeights(0.9, steps=6), statistics)["W"]
    limited = pruned(PruneWeights(0.9, steps=6, error_limit=0.1), statistics)["W"]
    signal = np.square(x @ exact).sum()
    errors = [np.sqrt(np.square(x @ (exact - w)).sum() / signal) for w in (free, limited)]
    assert errors[0] > 0.1
    assert errors[1] < 0.12  # the limit holds on the held-out samples; these are others
    assert 0.2 < (limited == 0).mean() < 0.9


def test_an_allocation_keeps_the_mean(statistics: Statistics) -> None:
    step = PruneWeights(0.5, method="wanda", allocation="outliers")
    found = pruned(step, statistics)
    zeros = sum(int((w == 0).sum()) for w in found.values())
    assert abs(zeros / sum(w.size for w in found.values()) - 0.5) <= 1 / N
    shares = [(w == 0).mean() for w in found.values()]
    assert abs(shares[0] - shares[1]) > 0.01


def test_the_same_weight_is_changed_once_and_tied_tables_are_left() -> None:
    model = model_of(proto(TIED, E=weights(0, VOCAB, WIDTH), W=weights(1, WIDTH, WIDTH)))
    (record,) = Pipeline([PruneWeights(method="magnitude", min_elements=1)]).run(model)
    assert record.changed == 1
    assert [(s.where, s.reason) for s in record.skipped] == [
        ("E", "it is used in several ways: every zero would show in every token")
    ]


def test_half_precision_stays_half_precision() -> None:
    text = "agraph (float16[m, 128] x) => (float16[m, 96] y) { a = MatMul (x, W) y = MatMul (a, V) }"
    model = model_of(proto(text, W=weights(0, K, N, dtype=np.float16), V=weights(1, N, N, dtype=np.float16)))
    Pipeline([PruneWeights(method="magnitude")]).run(model)
    weight = weight_of(model.graph.tensors()["W"]).load()
    assert weight.dtype == np.float16
    assert (weight == 0).sum() == weight.size // 2


def test_weights_that_are_left_say_why() -> None:
    model = model_of(two())
    steps = [PruneWeights(method="magnitude", exclude=("^V$",), pattern="2:4", min_elements=20_000)]
    (record,) = Pipeline(steps).run(model)
    assert not record.changed
    assert {s.where: s.reason for s in record.skipped} == {
        "W": "12288 elements, fewer than min_elements = 20000",
        "V": "it is excluded by '^V$'",
        "head": HEAD,
    }
    (record,) = Pipeline([PruneWeights(method="magnitude", pattern="3:5")]).run(model)
    wanted = {HEAD, *(f"K = {k} is no multiple of 5, which '3:5' needs" for k in (K, N))}
    assert {s.reason for s in record.skipped} == wanted


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"sparsity": 1.0}, "sparsity = 1.0 is not possible"),
        ({"sparsity": -0.1}, "sparsity = -0.1 is not possible"),
        ({"steps": 0}, "steps = 0 is not possible"),
        ({"error_limit": -1.0}, "error_limit = -1.0 is negative"),
        ({"pattern": "2-4"}, "unknown pattern '2-4'"),
        ({"pattern": "2:4", "allocation": "outliers"}, "fixes the sparsity"),
        ({"exclude": ("(",)}, "no regular expression"),
    ],
)
def test_options_out_of_range(options: dict[str, object], what: str) -> None:
    with pytest.raises(UsageError) as caught:
        PruneWeights(**options)  # type: ignore[arg-type]
    assert what in caught.value.what


def test_data_are_asked_for() -> None:
    for step in (PruneWeights(), PruneWeights(method="magnitude", refit=True)):
        with pytest.raises(UsageError, match="need calibration data"):
            Pipeline([step]).run(model_of(two()))
