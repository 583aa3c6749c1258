"""`quantize_weights{method=calibrated}` on statistics of a small model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim_llm.concepts.block_weights import WeightScheme
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import from_proto
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.ir.weights.jobs import derive
from onnxslim_llm.passes.quantize.codes.calibrated_job import CalibratedJob
from onnxslim_llm.passes.quantize.codes.job import QuantizeJob
from onnxslim_llm.passes.quantize.quantize_weights import QuantizeWeights
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.stats.calibration import TensorCalibration
from onnxslim_llm.stats.collect import collect
from onnxslim_llm.stats.statistics import Statistics

K, N = 96, 40


def _proto() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal((K, N)).astype(np.float32), "W"),
        numpy_helper.from_array(rng.standard_normal((128, K)).astype(np.float32), "unseen"),
    ]
    nodes = [helper.make_node("MatMul", ["x", "W"], ["y"])]
    io = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["T", d]) for n, d in (("x", K), ("y", N))]
    graph = helper.make_graph(nodes, "g", io[:1], io[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _rows(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).standard_normal((6, K)) * 2
    return (rng.standard_normal((count, 6)) @ mixing + rng.standard_normal((count, K))).astype(np.float32)


@pytest.fixture
def statistics(tmp_path: Path) -> Statistics:
    path = tmp_path / "model.onnx"
    onnx.save(_proto(), path)
    data = TensorCalibration(tuple({"x": _rows(100, seed)} for seed in range(10)))
    return collect(path, "m", data, tmp_path / "statistics")[0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block"), [(4, 32), (4, 64), (2, 32), (3, 0), (8, 128)])
def test_the_output_is_nearer_on_rows_that_were_never_seen(
    statistics: Statistics, bits: int, block: int, symmetric: bool
) -> None:
    weight = weight_of(from_proto(_proto()).graph.tensors()["W"])
    moments = statistics.of_weight("W")
    assert moments is not None
    scheme = WeightScheme(bits, block, symmetric, "calibrated")
    plain = WeightScheme(bits, block, symmetric, "search")
    jobs = [CalibratedJob(weight, 0, scheme, "W", moments), QuantizeJob(weight, 0, plain, "W")]
    x, w = _rows(500, 99), weight.load()
    errors = []
    for job in jobs:
        parts = [output.load() for output in derive(job.with_layout("blocked_kn"))]
        scale = np.repeat(parts[1], job.stored_block, axis=0)[:K]
        zero = np.repeat(parts[2].astype(np.float32), job.stored_block, axis=0)[:K] if len(parts) > 2 else 0
        errors.append(np.square(x @ (w - (parts[0].astype(np.float32) - zero) * scale)).sum())
    assert errors[0] < errors[1]


@pytest.mark.parametrize("layout", ["blocked_kn", "blocked_nk", "nbits"])
def test_every_layout_has_the_same_numbers(statistics: Statistics, layout: str) -> None:
    weight = weight_of(from_proto(_proto()).graph.tensors()["W"])
    moments = statistics.of_weight("W")
    assert moments is not None
    job = CalibratedJob(weight, 0, WeightScheme(4, 32, False, "calibrated"), "W", moments)
    scales = derive(job)[1].load()
    other = derive(job.with_layout(layout))[1].load()  # type: ignore[arg-type]
    assert np.array_equal(scales, other if other.shape == scales.shape else other.T)


def test_without_data_it_is_refused() -> None:
    with pytest.raises(UsageError, match="needs calibration data") as caught:
        Pipeline([QuantizeWeights(method="calibrated")]).run(from_proto(_proto()), Context())
    assert "--calib" in caught.value.todo


def test_a_weight_without_statistics_is_searched_and_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    record = Pipeline([QuantizeWeights(method="calibrated", min_elements=16)]).run(
        from_proto(_proto()), Context(statistics=Statistics(tmp_path / "empty", "k"))
    )[0]
    assert record.changed
    assert ("W", "no calibration data reach it: quantized by search") in [(s.where, s.reason) for s in record.skipped]
