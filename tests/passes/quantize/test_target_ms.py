"""`quantize_weights{target_ms}`: the choice by given times; limits that hold; what is refused."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import from_proto
from onnxslim_llm.passes.quantize.quantize_weights import QuantizeWeights
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Change
from onnxslim_llm.targets import get_target
from onnxslim_llm.targets.product_times import ProductForm, TimeTable, read_times

WIDTH = 64
LAYERS = "ABCDEF"
#: The sum in the manifest is rounded to six digits behind the point.
ROUNDING_MS = 1e-6
#: A millionth of a second for so many elements, scaled by the width of the codes, and a constant for every product.
ELEMENTS_PER_US, CONSTANT_US = 4096.0, 2.0


def _proto() -> onnx.ModelProto:
    """Products one after the other, with errors that differ in what they cost by the weights' tails."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array((rng.standard_t(3 + i, (WIDTH, WIDTH)) / 8).astype(np.float32), name)
        for i, name in enumerate(LAYERS)
    ]
    names = ["x", *LAYERS.lower()[:-1], "y"]
    nodes = [helper.make_node("MatMul", [names[i], LAYERS[i]], [names[i + 1]]) for i in range(len(LAYERS))]
    io = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["T", WIDTH]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", io[:1], io[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _microseconds(form: ProductForm) -> float:
    """Like a machine whose kernels for 2 bits are slow."""
    slow = 3.0 if form.bits == 2 else 1.0
    return CONSTANT_US + slow * form.bits / 4 * form.rows * form.columns / ELEMENTS_PER_US + 4 / form.block


class _Times:
    """Says what was written down for a machine, and counts how often it was asked."""

    def __init__(self, target: str = "ort-cpu") -> None:
        self.target = target
        self.asked: list[int] = []

    def measure(self, forms: Collection[ProductForm], elements: int) -> TimeTable:
        self.asked.append(elements)
        seconds = {form: _microseconds(form) / 1e6 for form in forms}
        return TimeTable(self.target, "a processor", "a runtime", 1, seconds=seconds)


def _run(context: Context | None = None, **options: Any) -> Change:
    context = context or Context(target=get_target("ort-cpu"), timer=_Times())
    model = from_proto(_proto())
    step = QuantizeWeights(min_elements=0, scale_dtype="activation", **options)
    step.requires(model, context)
    return step.apply(model, context)


def _seconds(change: Change) -> float:
    return sum(entry["expected_ms"] for entry in change.detail["tensors"])


@pytest.mark.parametrize("limit", [0.0185, 0.02, 0.023, 0.03])
def test_the_time_holds_and_is_told(limit: float) -> None:
    change = _run(target_ms=limit)
    assert _seconds(change) <= limit + ROUNDING_MS
    assert change.detail["expected_ms"] == pytest.approx(_seconds(change), abs=ROUNDING_MS)
    table = TimeTable.from_json(json.loads(json.dumps(change.detail["product_times"])))
    assert table.processor == "a processor"
    assert all(1e6 * s == pytest.approx(_microseconds(form), rel=1e-3) for form, s in table.seconds.items())


def test_more_time_costs_less() -> None:
    costs = [
        sum(e["expected_kl"] for e in _run(target_ms=limit).detail["tensors"]) for limit in (0.0185, 0.02, 0.023, 0.03)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 2 * costs[-1]


def test_forms_that_are_slow_are_not_chosen_for_their_few_bytes() -> None:
    assert {e["bits"] for e in _run(target_ms=0.0185).detail["tensors"]} == {4}


@pytest.mark.parametrize(("bits", "limit"), [(5.0, 0.030), (8.6, 0.02), (5.6, 0.0205)])
def test_both_limits_hold(bits: float, limit: float) -> None:
    change = _run(target_bits=bits, target_ms=limit)
    assert change.detail["bits_per_weight"] <= bits
    assert _seconds(change) <= limit + ROUNDING_MS


def test_weights_are_read_once_a_token() -> None:
    timer = _Times()
    _run(Context(target=get_target("ort-cpu"), timer=timer), target_ms=1.0)
    assert timer.asked == [len(LAYERS) * WIDTH * WIDTH]


def test_scopes_hold_and_count() -> None:
    change = _run(target_ms=0.023, scopes=({"match": "^A$", "bits": 8, "block": 32},))
    bits = {entry["name"]: entry["bits"] for entry in change.detail["tensors"]}
    assert bits["A"] == 8
    assert _seconds(change) <= 0.023 + ROUNDING_MS


def test_a_limit_that_cannot_be_met_is_told_with_the_shortest_time() -> None:
    with pytest.raises(UsageError, match=r"do not fit into 0\.01 ms: the fastest forms take 0\.0[0-9]+") as caught:
        _run(target_ms=0.01)
    ask = float((caught.value.todo or "").split("ask for ")[1].split(" ms")[0])
    _run(target_ms=ask)
    with pytest.raises(UsageError, match=r"within 4\.7 bits a weight"):
        _run(target_ms=0.001, target_bits=4.7)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_times_that_make_no_sense_are_refused(value: float) -> None:
    with pytest.raises(UsageError, match=r"target_ms = .* is not possible"):
        QuantizeWeights(target_ms=value)


def test_options_that_would_not_count_are_refused() -> None:
    with pytest.raises(UsageError, match=r"target_ms = 2 shares bits and blocks out: embedding_bits"):
        QuantizeWeights(target_ms=2.0, embedding_bits=4)
    with pytest.raises(UsageError, match="only of use with target_ms"):
        QuantizeWeights(times="manifest.json")


def test_nothing_is_measured_outside_of_a_compile() -> None:
    with pytest.raises(UsageError, match="nothing can be measured here") as caught:
        _run(Context(target=get_target("ort-cpu")), target_ms=1.0)
    assert "times" in (caught.value.todo or "")


def _manifest(folder: Path, change: Change) -> str:
    path = folder / "manifest.json"
    path.write_text(json.dumps({"passes": [{"detail": {}}, {"detail": change.detail}]}))
    return str(path)


def test_given_times_make_the_same_choice_without_a_measurement(tmp_path: Path) -> None:
    measured = _run(target_ms=0.021)
    given = _run(Context(target=get_target("ort-cpu")), target_ms=0.021, times=_manifest(tmp_path, measured))
    assert given.detail["tensors"] == measured.detail["tensors"]


def test_times_of_something_else_are_refused(tmp_path: Path) -> None:
    times = _manifest(tmp_path, _run(target_ms=0.021))
    with pytest.raises(UsageError, match="the times are those of target 'ort-cpu', not of 'portable'"):
        _run(Context(target=get_target("portable")), target_ms=0.021, times=times)
    few = _manifest(tmp_path, _run(target_ms=0.021, symmetric=True))
    with pytest.raises(UsageError, match="there is no time for rows=64"):
        _run(Context(target=get_target("ort-cpu")), target_ms=0.021, times=few)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"passes": []}', '{"rows": [[1]], "columns": ["rows"]}', '{"passes": [{"detail": 3}]}']
)
def test_files_without_times_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "times.json"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_times(path)
    assert str(path) in caught.value.where
    with pytest.raises(UsageError, match="cannot be read"):
        read_times(tmp_path / "missing.json")
