"""Targets that compute on nothing but integers: shared scales, mixed widths, bad ranges, what is quantized already."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import pytest
from block_models import proto, weights
from qdq_checks import (
    INTEGER_PROCESSOR,
    half_integer_nodes,
    node_of,
    observer,
    parameters,
    producer,
    quantized,
    reason,
    run,
    value,
    with_rules,
)

from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.model import from_proto
from onnxslim_llm.passes.qdq.quantize_activations import QuantizeActivations
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.targets.qdq_rules import QdqRules, QuantizedOp
from onnxslim_llm.targets.qdq_tables import PRODUCTS, WHOLE_GRAPH

X = weights(1, 4, 8)
OPERATORS = {op for op, rule in WHOLE_GRAPH.ops.items() if not rule.same_scale}

#: A branch through everything that moves data, a norm, a softmax, and a residual.
BLOCK = """agraph (float[m, 8] x) => (float[m, 8] y, float[m, 16] z) {
    n = LayerNormalization (x, g, b)
    a = MatMul (n, W)
    r = Reshape (a, shape)
    t = Transpose <perm = [0, 2, 1]> (r)
    u = Reshape (t, back)
    s = Softmax (u)
    c = Concat <axis = 1> (u, n)
    z = Relu (c)
    y = Add (s, x)
}"""
TENSORS = {
    "W": weights(2, 8, 8),
    "g": np.abs(weights(3, 8)),
    "b": weights(4, 8),
    "shape": np.array([-1, 2, 4]),
    "back": np.array([-1, 8]),
}
#: Ten operators whose results have 8 bits: their noise together, some 2 % of the largest value.
COARSE, FINE = 0.05, 2e-3


def block() -> onnx.ModelProto:
    return proto(BLOCK, **TENSORS)


def closeness(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize(("activations", "tolerance"), [("uint8", COARSE), ("uint16", FINE)])
def test_every_operator_reads_and_writes_codes(activations: str, tolerance: float) -> None:
    source = block()
    model, record, _ = quantized(
        source, {"x": X}, target=INTEGER_PROCESSOR, activations=activations, calibrator="minmax"
    )
    assert half_integer_nodes(model, OPERATORS) == []
    assert record.skipped == []
    wanted, found = run(source, {"x": X}), run(model, {"x": X})
    assert list(found) == ["y", "z"]
    for name, array in wanted.items():
        limit = tolerance if activations == "uint8" else tolerance + 2 / 127  # weights have 8 bits either way
        assert closeness(found[name], array) < limit


def test_moved_data_keep_their_scale() -> None:
    model, _, _ = quantized(block(), {"x": X}, target=INTEGER_PROCESSOR)
    made = {
        node.inputs[0].name.removesuffix("/float"): node for node in model.graph.nodes if node.op == "QuantizeLinear"
    }
    shared = [parameters_of(made[name]) for name in ("a", "r", "t", "u", "c", "n")]
    assert len(set(shared)) == 1  # Concat ties what is moved to the other operand
    assert parameters_of(made["s"]) == (pytest.approx(1 / 255), 0)  # a softmax lies in [0, 1], whatever the data
    values = source_values("u", "n")
    assert shared[0][0] <= np.ptp(np.append(values, 0)) / 255 * (1 + 2**-20)


def parameters_of(quantize: object) -> tuple[float, int]:
    return float(value(quantize.inputs[1])), int(value(quantize.inputs[2]))  # type: ignore[attr-defined]


def source_values(*names: str) -> np.ndarray:
    source = block()
    source.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    found = run(source, {"x": X})
    return np.concatenate([found[name].reshape(-1) for name in names])


def test_max_pool_and_slice_share_too() -> None:
    text = """agraph (float[1, 2, 8] x) => (float[1, 2, 3] y) {
        a = Relu (x) p = MaxPool <kernel_shape = [2], strides = [2]> (a) y = Slice (p, start, end, axes) }"""
    tensors = {"start": np.array([1]), "end": np.array([4]), "axes": np.array([2])}
    model, _, _ = quantized(proto(text, **tensors), {"x": weights(1, 1, 2, 8)}, target=INTEGER_PROCESSOR)
    pairs = [parameters_of(n) for n in model.graph.nodes if n.op == "QuantizeLinear"]
    assert len(pairs) == 4
    assert len(set(pairs[1:])) == 1


def test_a_constant_that_is_moved_shares_the_scale_and_is_stored_as_codes() -> None:
    text = "agraph (int64[n] i, float[n, 8] x) => (float[n, 8] y) { e = Gather (E, i) y = Add (e, x) }"
    table = weights(5, 6, 8)
    feeds = {"i": np.array([0, 3, 5, 1]), "x": X}
    model, _, _ = quantized(proto(text, E=table), feeds, target=INTEGER_PROCESSOR, calibrator="minmax")
    dequantize = producer(node_of(model, "Gather").inputs[0])
    codes = value(dequantize.inputs[0])
    scale, zero = parameters(dequantize)
    assert codes.dtype == np.uint8
    np.testing.assert_allclose((codes.astype(int) - zero) * scale, table, atol=scale)
    assert closeness(run(model, feeds)["y"], table[feeds["i"]] + X) < COARSE


def test_constant_zeros_are_exact() -> None:
    text = "agraph (float[m, 8] x) => (float[m, 8] y) { y = Add (x, Z) }"
    model, _, _ = quantized(proto(text, Z=np.zeros(8, np.float32)), {"x": X}, target=INTEGER_PROCESSOR)
    dequantize = producer(node_of(model, "Add").inputs[1])
    assert (value(dequantize.inputs[0]).astype(int) == parameters(dequantize)[1]).all()


@pytest.mark.parametrize("calibrator", ["minmax", "mse", "percentile", "entropy", "moving_average"])
def test_a_tensor_that_is_always_zero_is_named(calibrator: str) -> None:
    text = "agraph (float[m, 8] x) => (float[m, 8] y) { dead = Relu (x) y = Add (dead, dead) }"
    with pytest.raises(ModelError, match="its range is zero") as caught:
        quantized(proto(text), {"x": -np.abs(X)}, target=INTEGER_PROCESSOR, calibrator=calibrator)
    assert caught.value.where == "tensor 'dead'"


@pytest.mark.parametrize(("filled", "what"), [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")])
def test_a_tensor_that_is_not_finite_is_named(filled: float, what: str) -> None:
    text = "agraph (float[m, 8] x) => (float[m, 8] y) { bad = Mul (x, S) y = Relu (bad) }"
    scale = np.full(8, filled, np.float32)
    source = proto(text, S=scale)
    with pytest.raises(ModelError, match=what) as caught:
        quantized(source, {"x": np.ones_like(X)}, target=INTEGER_PROCESSOR)
    assert "bad" in caught.value.where or "y" in caught.value.where


def test_a_range_wider_than_float32_is_named() -> None:
    text = "agraph (float[m, 8] x) => (float[m, 8] y) { wide = Identity (x) y = Relu (wide) }"
    wide = np.tile(np.float32([3e38, -3e38]), (4, 4))
    with pytest.raises(ModelError, match="wider than float32") as caught:
        quantized(proto(text), {"x": wide}, target=INTEGER_PROCESSOR, calibrator="minmax")
    assert caught.value.where == "tensor 'x'"


def test_data_that_never_reach_a_tensor_are_an_error() -> None:
    text = "agraph (float[m, 8] x) => (float[m, 8] y) { y = Relu (x) }"
    with pytest.raises(ModelError, match="do not reach it"):
        quantized(proto(text), {"x": np.zeros((0, 8), np.float32)}, target=INTEGER_PROCESSOR)


def test_quantized_models_stay_as_they_are() -> None:
    model, _, _ = quantized(block(), {"x": X}, target=INTEGER_PROCESSOR)
    before = model.to_proto()
    again = from_proto(before)
    (record,) = Pipeline([QuantizeActivations()]).run(
        again, Context(target=INTEGER_PROCESSOR, observer=observer({"x": X}))
    )
    assert again.census() == model.census()
    assert record.detail["pairs"] == 0
    np.testing.assert_array_equal(run(again, {"x": X})["y"], run(model, {"x": X})["y"])


def test_half_quantized_models_are_completed_around_what_is_there() -> None:
    text = """agraph (float[m, 8] x) => (float[m, 8] y) {
        q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) y = MatMul (d, W) }"""
    tensors = {"s": np.float32(0.05), "z": np.uint8(100), "W": weights(2, 8, 8)}
    model, record, _ = quantized(proto(text, **tensors), {"x": X}, target=INTEGER_PROCESSOR)
    product = node_of(model, "MatMul")
    assert parameters(producer(product.inputs[0])) == (pytest.approx(0.05), 100)
    assert producer(product.inputs[1]).op == "DequantizeLinear"
    assert record.detail["pairs"] == 1  # of the result


def test_what_has_no_rule_stays_float_and_so_does_what_only_feeds_it() -> None:
    text = """agraph (float[m, 8] x) => (float[m, 8] y, float[8, m] z) {
        a = MatMul (x, W) f = Selu (a) [moved] t = Transpose (f) z = Selu (t) y = Relu (a) }"""
    model, record, _ = quantized(proto(text, W=weights(2, 8, 8)), {"x": X}, target=INTEGER_PROCESSOR)
    assert reason(record, "moved") == "it moves data between nodes that stay float"
    assert half_integer_nodes(model, OPERATORS) == []
    assert producer(node_of(model, "Selu").inputs[0]).op == "DequantizeLinear"


def test_sensitive_nodes_and_their_makers_get_wide_codes() -> None:
    text = """agraph (float[m, 8] x) => (float[m, 8] y, float[m, 8] z) {
        [make] h = Mul (x, S) [spiky] y = MatMul (h, W) [calm] z = MatMul (x, V) }"""
    scale = np.ones(8, np.float32)
    scale[0] = 1000
    w = weights(2, 8, 8)
    w[0] = 0  # the largest channel reaches nothing: its range is all that is left of it
    source = proto(text, S=scale, W=w, V=weights(3, 8, 8))
    coarse, _, _ = quantized(source, {"x": X}, target=INTEGER_PROCESSOR, calibrator="minmax")
    model, record, _ = quantized(source, {"x": X}, target=INTEGER_PROCESSOR, calibrator="minmax", sensitive_below_db=25)
    assert record.detail["sensitive"] == ["make", "spiky"]
    wide = {
        node.name: producer(node.inputs[0]).inputs[2].dtype
        for node in model.graph.nodes
        if node.op in ("Mul", "MatMul")
    }
    assert wide == {"make": np.uint16, "spiky": np.uint16, "calm": np.uint8}
    assert half_integer_nodes(model, OPERATORS) == []
    wanted = run(source, {"x": X})
    assert closeness(run(coarse, {"x": X})["y"], wanted["y"]) > 0.2
    assert closeness(run(model, {"x": X})["y"], wanted["y"]) < COARSE
    assert closeness(run(model, {"x": X})["z"], wanted["z"]) < COARSE


def test_angles_are_sensitive_however_large_they_are() -> None:
    text = "agraph (float[m, 8] x) => (float[m, 8] y) { [angle] a = Mul (x, S) [wave] y = Sin (a) }"
    source = proto(text, S=np.full(8, 100, np.float32))
    model, record, _ = quantized(source, {"x": X}, target=INTEGER_PROCESSOR, sensitive_below_db=20)
    assert record.detail["sensitive"] == ["angle", "wave"]
    assert closeness(run(model, {"x": X})["y"], run(source, {"x": X})["y"]) < COARSE


def test_products_of_activations_have_two_quantized_operands() -> None:
    text = "agraph (float[m, 8] x) => (float[m, m] y) { t = Transpose (x) y = MatMul (x, t) }"
    model, _, _ = quantized(proto(text), {"x": X}, target=with_rules(QdqRules(PRODUCTS)))
    assert half_integer_nodes(model, {"MatMul"}) == []
    assert closeness(run(model, {"x": X})["y"], X @ X.T) < COARSE


def test_convolutions_have_a_scale_per_output_channel() -> None:
    text = "agraph (float[1, 3, 6, 6] x) => (float[1, 4, 4, 4] y) { y = Conv (x, W, b) }"
    x, w = weights(1, 1, 3, 6, 6), weights(2, 4, 3, 3, 3)
    source = proto(text, W=w, b=weights(3, 4))
    model, _, _ = quantized(source, {"x": x}, target=INTEGER_PROCESSOR)
    dequantize = producer(node_of(model, "Conv").inputs[1])
    assert dequantize.attrs["axis"] == 0
    np.testing.assert_allclose(value(dequantize.inputs[1]), np.abs(w).max((1, 2, 3)) / 127, rtol=1e-6)
    assert closeness(run(model, {"x": x})["y"], run(source, {"x": x})["y"]) < COARSE


def test_ranges_of_definition_join_with_observed_ones() -> None:
    rules = QdqRules(
        {"Concat": QuantizedOp(same_scale=True), "Softmax": QuantizedOp(result_range=(0.0, 1.0)), "Relu": QuantizedOp()}
    )
    text = "agraph (float[m, 8] x) => (float[m, 16] y) { s = Softmax (x) r = Relu (x) y = Concat <axis = 1> (s, r) }"
    model, _, _ = quantized(proto(text), {"x": X}, target=with_rules(rules), calibrator="minmax")
    scale, zero = parameters(producer(node_of(model, "Concat").inputs[0]))
    assert zero == 0
    assert scale == pytest.approx(max(1.0, float(X.max())) / 255, rel=1e-6)


@pytest.mark.parametrize("size", [1.0, 1e6])
def test_the_bias_of_a_norm_whose_scale_is_coded_like_an_activation(size: float) -> None:
    rules = QdqRules({"LayerNormalization": QuantizedOp(inputs=(0, 1), bias=2)}, ("uint8", "uint16"))
    text = "agraph (float[m, 8] x) => (float[m, 8] y) { y = LayerNormalization (x, g, b) }"
    b = weights(4, 8) * np.float32(size)
    source = proto(text, g=np.abs(weights(3, 8)), b=b)
    model, _, _ = quantized(source, {"x": X}, target=with_rules(rules), activations="uint16")
    dequantize = producer(node_of(model, "LayerNormalization").inputs[2])
    codes = value(dequantize.inputs[0])
    assert codes.dtype == np.int32
    assert np.abs(codes.astype(np.int64)).max() <= 2**30
    np.testing.assert_allclose(codes * float(value(dequantize.inputs[1])), b, rtol=1e-4)
    assert closeness(run(model, {"x": X})["y"], run(source, {"x": X})["y"]) < FINE


def test_activations_beside_blocks_have_the_width_that_these_need() -> None:
    rules = replace(WHOLE_GRAPH, blocked_weights=("int4",), blocked_activation_bits=16)
    text = """agraph (float[m, 32] x) => (float[m, 8] y) {
        r = Relu (x)
        w = DequantizeLinear <axis = 0, block_size = 16> (W, s)
        y = MatMul (r, w)
    }"""
    codes = weights(2, 32, 8).astype(ml_dtypes.int4)
    model, _, _ = quantized(
        proto(text, W=codes, s=weights(3, 2, 8)), {"x": weights(1, 4, 32)}, target=with_rules(rules)
    )
    product, relu = node_of(model, "MatMul"), node_of(model, "Relu")
    assert value(producer(product.inputs[0]).inputs[2]).dtype == np.uint16
    assert value(producer(relu.inputs[0]).inputs[2]).dtype == np.uint8
    assert producer(product.inputs[1]).attrs["block_size"] == 16
