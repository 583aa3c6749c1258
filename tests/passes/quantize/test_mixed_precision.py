"""`quantize_weights{target_bits}`: bytes that hold, bits where they are worth most, products that stay right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import from_proto
from onnxslim_llm.passes.quantize.quantize_weights import QuantizeWeights
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Change
from onnxslim_llm.stats.calibration import TensorCalibration
from onnxslim_llm.stats.collect import collect
from onnxslim_llm.stats.gains import measure_gains
from onnxslim_llm.targets import get_target

WIDTH = 64


def _proto() -> onnx.ModelProto:
    """y = ((x A) B) C + 0.01 x D: errors in D matter a hundredth as much."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array((rng.standard_normal((WIDTH, WIDTH)) / 8).astype(np.float32), n) for n in "ABCD"]
    weights.append(numpy_helper.from_array(np.array(0.01, np.float32), "small"))
    nodes = [
        helper.make_node("MatMul", ["x", "A"], ["a"]),
        helper.make_node("MatMul", ["a", "B"], ["b"]),
        helper.make_node("MatMul", ["b", "C"], ["c"]),
        helper.make_node("MatMul", ["x", "D"], ["d"]),
        helper.make_node("Mul", ["d", "small"], ["e"]),
        helper.make_node("Add", ["c", "e"], ["y"]),
    ]
    io = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["T", WIDTH]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", io[:1], io[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _feeds(seed: int) -> dict[str, np.ndarray[Any, Any]]:
    return {"x": np.random.default_rng(seed).standard_normal((128, WIDTH)).astype(np.float32)}


@pytest.fixture
def context(tmp_path: Path) -> Context:
    path = tmp_path / "model.onnx"
    onnx.save(_proto(), path)
    data = TensorCalibration(tuple(_feeds(seed) for seed in range(5)))
    statistics = collect(path, "m", data, tmp_path / "statistics")[0]
    statistics.gains = measure_gains(path, data, statistics, threads=1)
    return Context(target=get_target("portable"), statistics=statistics)


def _run(context: Context, **options: Any) -> tuple[onnx.ModelProto, Change]:
    model = from_proto(_proto())
    step = QuantizeWeights(min_elements=0, scale_dtype="activation", **options)
    step.requires(model, context)
    change = step.apply(model, context)
    return model.to_proto(), change


def test_gains_tell_which_errors_matter(context: Context) -> None:
    assert context.statistics is not None
    gains = context.statistics.gains
    assert set(gains) == set("ABCD")
    # The error of C reaches the answer as it is, that of D at a hundredth of its size: a factor of 10,000.
    assert gains["C"].per_square / gains["D"].per_square == pytest.approx(1e4, rel=0.3)


def test_what_matters_less_gets_fewer_bits(context: Context) -> None:
    _, change = _run(context, method="calibrated", target_bits=5.5, widths=(2, 4, 8))
    bits = {entry["name"]: entry["bits"] for entry in change.detail["tensors"]}
    assert bits["D"] < min(bits[name] for name in "ABC")
    entry = change.detail["tensors"][0]
    zeros = "" if entry["symmetric"] else " with zero points"
    assert entry["expected_kl"] == entry["expected"][f"{entry['bits']}/{entry['block']}{zeros}"]


@pytest.mark.parametrize("method", ["calibrated", "search"])
@pytest.mark.parametrize("bits", [3.2, 4.6, 5.5, 7.1])
def test_the_bytes_hold(context: Context, method: str, bits: float) -> None:
    proto, change = _run(context, method=method, target_bits=bits)
    assert change.detail["bits_per_weight"] <= bits
    plain, small = (
        ort.InferenceSession(p.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, _feeds(9))[0]
        for p in (_proto(), proto)
    )
    assert np.linalg.norm(small - plain) < 0.7 * np.linalg.norm(plain)


def test_more_bits_are_better(context: Context) -> None:
    x = _feeds(9)
    plain = ort.InferenceSession(_proto().SerializeToString()).run(None, x)[0]
    errors = []
    for bits in (3.5, 4.5, 6.6, 8.6):
        proto, _ = _run(context, method="calibrated", target_bits=bits)
        errors.append(np.linalg.norm(ort.InferenceSession(proto.SerializeToString()).run(None, x)[0] - plain))
    assert errors == sorted(errors, reverse=True)


def test_scopes_hold(context: Context) -> None:
    scopes = ({"match": "^A$", "bits": 8},)
    _, change = _run(context, method="calibrated", target_bits=5.5, scopes=scopes)
    assert {entry["name"]: entry["bits"] for entry in change.detail["tensors"]}["A"] == 8


@pytest.mark.parametrize(("target_bits", "only_fast"), [(6.5, True), (3.5, False)])
def test_widths_without_a_fast_kernel_are_for_limits_that_need_them(
    context: Context, target_bits: float, only_fast: bool
) -> None:
    assert context.target is not None
    _, change = _run(context, method="calibrated", target_bits=target_bits)
    found = {entry["bits"] for entry in change.detail["tensors"]}
    assert (found <= set(context.target.fast_bits)) == only_fast


def test_too_few_bits_are_refused(context: Context) -> None:
    with pytest.raises(UsageError, match=r"do not fit into 2\.1 bits each") as caught:
        _run(context, method="calibrated", target_bits=2.1, widths=(4, 8))
    assert "or allow fewer bits" in caught.value.todo


def test_gains_are_measured_once(context: Context, tmp_path: Path) -> None:
    assert context.statistics is not None
    data = TensorCalibration(tuple(_feeds(seed) for seed in range(5)))
    again = measure_gains(tmp_path / "missing.onnx", data, context.statistics)
    assert again == context.statistics.gains


def test_probing_makes_do_without_data() -> None:
    step = QuantizeWeights(method="probed", target_bits=4.6)
    assert step.wants_statistics
    assert step.takes_own_text
    assert step.wants_gains
    assert not step.minds_cost
    assert QuantizeWeights(method="auto").minds_cost
    assert not QuantizeWeights(method="auto", scopes=({"match": "x", "method": "probed"},)).minds_cost
    assert not QuantizeWeights(method="calibrated").takes_own_text
    mixed = QuantizeWeights(method="probed", scopes=({"match": "x", "method": "calibrated"},))
    assert not mixed.takes_own_text


@pytest.mark.parametrize("method", ["auto", "probed"])
def test_probing_without_statistics_goes_by_role(method: str) -> None:
    context = Context(target=get_target("portable"))
    probed, change = _run(context, method=method, target_bits=4.5)
    searched, _ = _run(Context(target=get_target("portable")), method="search")
    assert probed.SerializeToString(deterministic=True) == searched.SerializeToString(deterministic=True)
    assert change.detail["bits_per_weight"] > 4.5
    assert context.notes == [
        "quantize_weights: target_bits = 4.5 does not count without statistics: bits go by role, up to 8"
    ]


def test_probing_without_statistics_asks_for_the_widths_by_role() -> None:
    four_only = replace(get_target("portable"), weight_bits=(4,))
    with pytest.raises(UsageError, match="cannot store weights of 8 bits"):
        _run(Context(target=four_only), method="auto", target_bits=4.5)


@pytest.mark.parametrize("method", ["auto", "probed"])
def test_probing_uses_statistics_that_are_there(context: Context, method: str) -> None:
    options = {"target_bits": 4.6}
    probed, _ = _run(context, method=method, **options)
    calibrated, _ = _run(context, method="calibrated", **options)
    assert probed.SerializeToString(deterministic=True) == calibrated.SerializeToString(deterministic=True)
