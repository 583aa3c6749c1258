from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import from_proto
from onnxslim_llm.passes.lowrank.compensate_low_rank import CompensateLowRank
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import PassRecord, Pipeline
from onnxslim_llm.stats.calibration import TensorCalibration
from onnxslim_llm.stats.collect import collect
from onnxslim_llm.stats.statistics import Statistics

K, N = 128, 96


def _proto() -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((K, N)).astype(np.float32), "W")
    io = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["T", d]) for n, d in (("x", K), ("y", N))]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "W"], ["y"])], "g", io[:1], io[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _rows(seed: int) -> np.ndarray[Any, Any]:
    """Inputs of which four directions hold most, as in language models."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).standard_normal((4, K)) * 3
    return (rng.standard_normal((200, 4)) @ mixing + rng.standard_normal((200, K))).astype(np.float32)


@pytest.fixture
def statistics(tmp_path: Path) -> Statistics:
    path = tmp_path / "model.onnx"
    onnx.save(_proto(), path)
    data = TensorCalibration(tuple({"x": _rows(seed)} for seed in range(10)))
    return collect(path, "m", data, tmp_path / "statistics")[0]


def _compiled(steps: str, statistics: Statistics | None) -> tuple[onnx.ModelProto, PassRecord]:
    model = from_proto(_proto())
    records = Pipeline(steps).run(model, Context(statistics=statistics))
    return model.to_proto(), records[-1]


def _error(proto: onnx.ModelProto) -> float:
    x = _rows(99)
    want, found = (ort.InferenceSession(p.SerializeToString()).run(None, {"x": x})[0] for p in (_proto(), proto))
    return float(np.square(found - want).sum())


@pytest.mark.parametrize("method", ["rtn", "search"])
def test_a_quarter_of_the_error_goes_on_rows_that_were_never_seen(statistics: Statistics, method: str) -> None:
    quantize = f"quantize_weights{{bits=4, method={method}}}"
    plain, _ = _compiled(quantize, statistics)
    better, record = _compiled(f"{quantize}, compensate_low_rank{{rank=8}}", statistics)
    assert record.changed == 1
    assert _error(better) < 0.75 * _error(plain)
    entry = record.detail["layers"][0]
    assert 0 <= entry["bytes"] - (4 * (K + N) + 2 * 8 * 4) <= 2100  # the rest is the graph's
    assert entry["error_ratio"] < 0.75


def test_what_does_not_help_is_left_and_named(statistics: Statistics) -> None:
    # Errors of compensated codes have no direction that is larger than the others.
    _, record = _compiled("quantize_weights{method=calibrated}, compensate_low_rank{rank=2, min_gain=0.3}", statistics)
    assert not record.changed
    assert "the error becomes" in record.skipped[0].reason


def test_it_works_without_data() -> None:
    proto, record = _compiled("quantize_weights{bits=4}, compensate_low_rank{rank=32, min_gain=0.05}", None)
    plain, _ = _compiled("quantize_weights{bits=4}", None)
    assert record.changed == 1
    assert _error(proto) < _error(plain)


def test_it_comes_after_the_quantizer() -> None:
    with pytest.raises(UsageError, match="cannot come after"):
        Pipeline("compensate_low_rank, quantize_weights").run(from_proto(_proto()))


def test_eight_bits_leave_less_than_four(statistics: Statistics) -> None:
    found = {}
    for bits in (4, 8):
        steps = f"quantize_weights{{bits=4, method=rtn}}, compensate_low_rank{{rank=8, bits={bits}}}"
        proto, record = _compiled(steps, statistics)
        found[bits] = (_error(proto), record.detail["layers"][0]["bytes"])
    assert found[8][0] < found[4][0]
    assert found[8][1] - found[4][1] == 4 * (K + N)


@pytest.mark.parametrize("budget", [0.4, 0.8])
def test_a_budget_bounds_the_bytes(statistics: Statistics, budget: float) -> None:
    plain, _ = _compiled("quantize_weights{bits=4, method=rtn}", statistics)
    better, record = _compiled(
        f"quantize_weights{{bits=4, method=rtn}}, compensate_low_rank{{rank=64, budget={budget}}}", statistics
    )
    sizes = [len(proto.SerializeToString()) for proto in (plain, better)]
    (layer,) = record.detail["layers"]
    assert layer["bytes"] <= budget * sizes[0]
    assert sizes[1] - sizes[0] <= layer["bytes"]
    assert _error(better) < _error(plain)


def test_a_budget_for_nothing_leaves_all_as_it_is(statistics: Statistics) -> None:
    _, record = _compiled("quantize_weights{bits=4, method=rtn}, compensate_low_rank{budget=0.001}", statistics)
    assert not record.changed
    assert "the budget is better spent on others" in record.skipped[0].reason


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank must be"),
        ({"min_gain": 1.0}, "min_gain must lie"),
        ({"budget": 1.0}, "budget = 1"),
        ({"bits": 5}, "bits must be 4 or 8"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        CompensateLowRank(**options)
