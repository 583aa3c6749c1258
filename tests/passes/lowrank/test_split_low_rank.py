"""`split_low_rank` on small models: the factors, the ranks, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from block_models import TIED, VOCAB, WIDTH, Array, model_of, proto, run, skipped, weights
from onnx import numpy_helper

from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.passes.lowrank.factor_job import FactorJob, matrix_of, whitening_of
from onnxslim_llm.passes.lowrank.ranks import break_even
from onnxslim_llm.passes.lowrank.split_low_rank import SplitLowRank
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import PassRecord, Pipeline
from onnxslim_llm.stats.calibration import TensorCalibration
from onnxslim_llm.stats.collect import collect
from onnxslim_llm.stats.statistics import Gain, Statistics
from onnxslim_llm.stats.whitened import low_rank, spectrum, whitened_by

K, N = 64, 96
#: The two products that may be split, and one that makes the output.
TEXT = f"""
    agraph (float[m, {K}] x) => (float[m, 32] y) {{
        a = MatMul (x, W)
        b = MatMul (a, V)
        t = Tanh (b)
        y = MatMul (t, head)
    }}
"""
#: Factors are kept in float32, their products summed over some hundred elements.
TOLERANCE = 1e-4


def source() -> onnx.ModelProto:
    return proto(TEXT, W=weights(0, K, N), V=weights(1, N, N) * np.float32(0.1), head=weights(2, N, 32))


def rows(seed: int) -> Array:
    """Inputs that a few directions dominate, as in language models."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(8, K)) * np.linspace(0.1, 3, K)
    return (rng.normal(size=(100, 8)) @ mixing + rng.normal(size=(100, K))).astype(np.float32)


def statistics_of(model: onnx.ModelProto, folder: Path) -> Statistics:
    path = folder / "model.onnx"
    onnx.save(model, path)
    data = TensorCalibration(tuple({"x": rows(seed)} for seed in range(10)))
    return collect(path, "m", data, folder / "statistics")[0]


@pytest.fixture
def statistics(tmp_path: Path) -> Statistics:
    return statistics_of(source(), tmp_path)


def compiled(
    steps: str, statistics: Statistics | None = None, model: onnx.ModelProto | None = None
) -> tuple[onnx.ModelProto, list[PassRecord], Context]:
    graph = model_of(model or source())
    context = Context(statistics=statistics)
    records = Pipeline(steps).run(graph, context)
    return graph.to_proto(), records, context


def stored(model: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def test_a_product_becomes_two(statistics: Statistics) -> None:
    result, (record,), _ = compiled("split_low_rank{rank=16}", statistics)
    found = stored(result)
    assert found["W_A"].shape == (K, 16)
    assert found["W_B"].shape == (16, N)
    assert [n.op_type for n in result.graph.node] == ["MatMul"] * 4 + ["Tanh", "MatMul"]
    assert record.detail["parameters"] == [K * N + N * N, 16 * (K + N + N + N)]
    assert skipped(record) == {"head": "it is an embedding or makes the logits: no direction of it can be spared"}
    onnx.checker.check_model(result, full_check=True)


def test_the_error_is_the_tail_of_the_squared_singular_values(statistics: Statistics) -> None:
    """The figure that the project promises: within 1 %, with no damping to speak of."""
    moments = statistics.of_weight("W")
    assert moments is not None
    gram = moments.load().fit.gram
    assert gram is not None
    whitening = whitened_by(gram, damping=1e-7)
    assert whitening is not None
    weight = weights(0, K, N)
    x = np.concatenate([rows(seed) for seed in range(10) if seed % 5 != 1]).astype(np.float64)  # the others are held
    for rank in (4, 16, 48):
        found = low_rank(weight, whitening, rank)
        change = weight.astype(np.float64) - found.left.astype(np.float64) @ found.right
        assert np.square(x @ change).sum() == pytest.approx(found.energy[rank:].sum(), rel=0.01)


def test_knowing_the_inputs_helps_on_rows_never_seen(statistics: Statistics) -> None:
    x, wanted = rows(99), rows(99) @ weights(0, K, N)

    def error(method: str) -> float:
        found = stored(compiled(f"split_low_rank{{method={method}, rank=16}}", statistics)[0])
        return float(np.square(x @ found["W_A"] @ found["W_B"] - wanted).sum())

    plain, by_channel, whitened = (error(method) for method in ("svd", "asvd", "whitened"))
    assert whitened < by_channel < plain
    assert whitened < 0.5 * plain


def test_gemm_keeps_its_bias_and_factors() -> None:
    text = f"""
        agraph (float[m, {K}] x) => (float[m, 32] y) {{
            g = Gemm <alpha = 0.5, beta = 2.0, transB = 1> (x, W, c)
            t = Tanh (g)
            y = MatMul (t, head)
        }}
    """
    low = (weights(0, N, 8) @ weights(1, 8, K)) / np.float32(K)
    model = proto(text, W=low.astype(np.float32), c=weights(2, N), head=weights(3, N, 32))
    result, (record,), _ = compiled("split_low_rank{method=svd, rank=8}", model=model)
    assert record.changed == 1
    assert np.allclose(run(result, {"x": rows(0)}), run(model, {"x": rows(0)}), atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_factors_have_the_type_of_the_weight_behind_its_carriers(dtype: Any) -> None:
    text = f"""
        agraph (float[m, {K}] x) => (float[m, 32] y) {{
            c = Cast <to = 1> (W)
            w = Transpose <perm = [1, 0]> (c)
            p = MatMul (x, w)
            t = Tanh (p)
            y = MatMul (t, head)
        }}
    """
    low = ((weights(0, N, 8) @ weights(1, 8, K)) / np.float32(K)).astype(dtype)
    model = proto(text, W=low, head=weights(3, N, 32) / np.float32(N))
    result, _, _ = compiled("split_low_rank{method=svd, rank=8}", model=model)
    assert {name: value.dtype for name, value in stored(result).items() if name != "head"} == dict.fromkeys(
        ("W_A", "W_B"), dtype
    )
    assert "Transpose" not in [n.op_type for n in result.graph.node]
    # tanh of values around 1; float16 factors of size 1 are off by 2^-11 each, sums of 8 and 64 of them
    atol = TOLERANCE if dtype == np.float32 else 0.02
    assert np.allclose(run(result, {"x": rows(0) / 10}), run(model, {"x": rows(0) / 10}), atol=atol)


SHARED = f"""
    agraph (float[m, {K}] x) => (float[m, 32] y) {{
        a = MatMul (x, Wq)
        b = MatMul (x, Wk)
        n = Tanh (x)
        c = MatMul (n, Wo)
        j = Concat <axis = -1> (a, b, c)
        t = Tanh (j)
        y = MatMul (t, head)
    }}
"""


def test_weights_of_one_tensor_share_their_first_factor() -> None:
    basis = weights(0, K, 8)
    parts = {name: basis @ weights(i, 8, n) for i, (name, n) in enumerate({"Wq": N, "Wk": 32, "Wo": N}.items(), 1)}
    model = proto(
        SHARED,
        head=weights(4, 2 * N + 32, 32) / np.float32(N),
        **{name: (part / K).astype(np.float32) for name, part in parts.items()},
    )
    result, (record,), _ = compiled("split_low_rank{method=svd, rank=8, shared=true, min_elements=1}", model=model)
    assert set(stored(result)) == {"Wq_A", "Wq_B", "Wk_B", "Wo_A", "Wo_B", "head"}
    assert record.detail["tensors"][0]["shared_by"] == ["Wq", "Wk"]
    assert sum(n.op_type == "MatMul" for n in result.graph.node) == 6
    assert np.allclose(run(result, {"x": rows(0)}), run(model, {"x": rows(0)}), atol=TOLERANCE)


def test_a_weight_of_two_readers_is_split_once() -> None:
    text = f"""
        agraph (float[m, {K}] x) => (float[m, 32] y) {{
            a = MatMul (x, W)
            t = Tanh (a)
            b = MatMul (t, W)
            u = Tanh (b)
            y = MatMul (u, head)
        }}
    """
    model = proto(text, W=weights(0, K, K), head=weights(1, K, 32))
    result, (record,), _ = compiled("split_low_rank{method=svd, rank=8}", model=model)
    assert set(stored(result)) == {"W_A", "W_B", "head"}
    assert record.detail["parameters"] == [K * K, 8 * 2 * K]
    # multiplications of a token: both readers count, and both fall alike
    _, (record,), _ = compiled("split_low_rank{method=svd, budget=0.5, budget_of=flops}", model=model)
    assert record.detail["parameters"][1] <= 0.5 * K * K


def test_rules(statistics: Statistics) -> None:
    moments = statistics.of_weight("W")
    graph = model_of(source())
    matrix = matrix_of([(weight_of(graph.graph.tensors()["W"]), 0)], "W")
    energy = spectrum(matrix, whitening_of("whitened", moments))

    def rank(rule: str) -> int:
        _, (record,), _ = compiled(f"split_low_rank{{{rule}, align=1}}", statistics)
        return int(next(t["rank"] for t in record.detail["tensors"] if t["name"] == "W"))

    assert rank("ratio=0.5") == int(0.5 * K * N / (K + N))
    kept = rank("energy=0.9")
    assert energy[:kept].sum() >= 0.9 * energy.sum() > energy[: kept - 1].sum()
    assert rank("error=0.4") == rank("energy=0.84")


def test_a_budget_is_met_and_better_than_the_same_ratio_for_all(statistics: Statistics) -> None:
    # V does little to the answer, W much.
    gains = {"W": Gain(1.0, 1.0), "V": Gain(1e-4, 1.0)}
    known = Statistics(statistics.folder, statistics.key, {}, gains, statistics._taps)
    result, (record,), _ = compiled("split_low_rank{budget=0.6}", known)
    before, after = record.detail["parameters"]
    assert 0.55 * before < after <= 0.6 * before
    uniform, (even,), _ = compiled("split_low_rank{ratio=0.6}", known)
    assert even.detail["parameters"][1] <= after * 1.05
    x = rows(99)

    def error(model: onnx.ModelProto) -> float:
        found = stored(model)
        w = found["W"] if "W" in found else found["W_A"] @ found["W_B"]
        return float(np.square(x @ (w - weights(0, K, N))).sum())

    assert error(result) < 0.5 * error(uniform)


def test_a_budget_that_cannot_be_met_says_the_closest() -> None:
    with pytest.raises(UsageError, match=r"rank 8 for every weight still takes 0\.183") as caught:
        compiled("split_low_rank{method=svd, budget=0.1}")
    assert "0.183 or more" in caught.value.todo
    with pytest.raises(UsageError, match="still takes 2816"):
        compiled("split_low_rank{method=svd, budget=2000}")


def test_ranks_that_no_factors_should_have() -> None:
    _, (record,), _ = compiled(f"split_low_rank{{method=svd, rank={K + 1}}}")
    assert skipped(record)["W"] == f"rank {K + 1} is more than min(K, N) = {K}"
    limit = break_even(K, N)
    _, (record,), _ = compiled(f"split_low_rank{{method=svd, rank={limit + 1}}}")
    assert skipped(record)["W"] == f"rank {limit + 1}: from {limit + 1} on, factors are no smaller than the weight"
    _, (record,), _ = compiled("split_low_rank{method=svd, energy=0.9999}")
    assert "factors are no smaller" in skipped(record)["W"]


def test_break_even() -> None:
    for rows_, columns in ((64, 96), (16, 16), (256, 768)):
        limit = break_even(rows_, columns)
        assert limit * (rows_ + columns) < rows_ * columns <= (limit + 1) * (rows_ + columns)


def test_weights_that_are_left_say_why(statistics: Statistics) -> None:
    _, (record,), _ = compiled("split_low_rank{method=svd, rank=8, exclude=['^V$'], min_elements=7000}")
    assert skipped(record)["W"] == "6144 elements, fewer than min_elements = 7000"
    assert skipped(record)["V"] == "it is excluded by '^V$'"
    quantized = "quantize_weights{min_elements=1, lm_head_bits=0}"
    model, _, _ = compiled(f"{quantized}, lower_portable")
    _, (record,), _ = compiled("split_low_rank{method=svd, rank=8}", model=model)
    assert set(skipped(record).values()) >= {"it is quantized already"}
    tied = proto(TIED, E=weights(0, VOCAB, WIDTH), W=weights(1, WIDTH, WIDTH))
    _, (record,), _ = compiled("split_low_rank{method=svd, rank=8}", model=tied)
    assert skipped(record) == {"E": "it is used in several ways: no direction of it can be spared"}
    unseen = Statistics(statistics.folder, statistics.key)
    _, (record,), _ = compiled("split_low_rank{rank=8}", unseen)
    assert skipped(record)["W"] == "no calibration data reach it: its directions are all alike"


def test_nonfinite_weights_are_named() -> None:
    bad = weights(0, K, N)
    bad[3, 4] = np.nan
    model = proto(TEXT, W=bad, V=weights(1, N, N), head=weights(2, N, 32))
    for rule in ("rank=8", "budget=0.5"):
        with pytest.raises(ModelError, match="NaN or infinite") as caught:
            compiled(f"split_low_rank{{method=svd, {rule}}}", model=model)
        assert caught.value.where == "tensor 'W'"


def test_factors_know_their_inputs_and_can_be_quantized(statistics: Statistics) -> None:
    result, _, context = compiled("split_low_rank{rank=24}", statistics)
    factors = stored(result)
    known = context.statistics
    assert known is not None
    left, right = known.of_weight("W_A"), known.of_weight("W_B")
    assert left is not None
    assert right is not None
    gram, inner = left.load().fit.gram, right.load().fit.gram
    assert gram is not None
    assert inner is not None
    wide = factors["W_A"].astype(np.float64)
    assert np.allclose(inner, wide.T @ gram @ wide, rtol=TOLERANCE, atol=TOLERANCE * np.abs(inner).max())
    x, wanted = rows(99), run(result, {"x": rows(99)})

    def error(method: str) -> float:
        steps = f"split_low_rank{{rank=24}}, quantize_weights{{method={method}, min_elements=1, lm_head_bits=0}}"
        coded, records, _ = compiled(steps, statistics)
        assert records[-1].changed == 4
        return float(np.square(run(coded, {"x": x}) - wanted).sum())

    assert error("calibrated") < 0.8 * error("search")


def test_factors_are_computed_once_for_all_who_read_them(
    statistics: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    plain = FactorJob.computed

    def counted(job: FactorJob) -> list[Any]:
        done.append(job.where())
        return plain(job)

    monkeypatch.setattr(FactorJob, "computed", counted)
    compiled("split_low_rank{rank=24}, quantize_weights{method=calibrated, min_elements=1, lm_head_bits=0}", statistics)
    assert sorted(done) == ["V", "W"]


def test_the_same_bytes_twice(statistics: Statistics) -> None:
    first, second = (compiled("split_low_rank{budget=0.7}", statistics)[0] for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


def test_whitening_without_data_is_refused() -> None:
    with pytest.raises(UsageError, match="method 'whitened' needs calibration data"):
        compiled("split_low_rank{rank=8}")


def test_it_comes_before_the_quantizer() -> None:
    with pytest.raises(UsageError, match="cannot come after"):
        compiled("quantize_weights, split_low_rank{method=svd}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": -1}, "rank = -1"),
        ({"ratio": 1.0}, "ratio = 1"),
        ({"energy": 1.5}, "energy = 1.5"),
        ({"error": -0.1}, "error = -0.1"),
        ({"budget": -1.0}, "budget = -1"),
        ({"align": 0}, "align = 0"),
        ({"rank": 8, "budget": 0.5}, "rank and budget are rules for the same ranks"),
        ({"exclude": ("(",)}, "no regular expression"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        SplitLowRank(**options)
