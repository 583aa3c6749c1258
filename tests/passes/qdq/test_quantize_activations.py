"""Products with weights on integers: forms, numbers, options."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from block_models import proto, weights
from qdq_checks import node_of, parameters, producer, quantized, reason, run, value, with_rules

from onnxslim_llm.errors import UsageError
from onnxslim_llm.passes.qdq.quantize_activations import QuantizeActivations
from onnxslim_llm.targets.ort_cpu import ORT_CPU
from onnxslim_llm.targets.qdq_rules import QdqRules
from onnxslim_llm.targets.qdq_tables import FLOAT_RESULT_PRODUCTS, PRODUCT_RULES

K, N = 32, 24
X = weights(1, 5, K)
NAMED = f"agraph (float[m, {K}] x) => (float[m, {N}] y) {{ [p] y = MatMul (x, W) }}"
#: Float32 sums of 32 products in another order, and the product of two scales in one rounding instead of two.
FLOAT = 40 * 2**-24


def exact_result(model: object, x: np.ndarray, w: np.ndarray, axis: int = 1) -> np.ndarray:
    """x W with both rounded as the model's Q and DQ nodes say, in float64."""
    node = node_of(model, "MatMul")  # type: ignore[arg-type]
    scale, zero = parameters(producer(node.inputs[0]))
    codes = np.clip(np.rint(x / np.float32(scale)) + zero, 0, 255)
    dequantize = producer(node.inputs[1])
    scales = value(dequantize.inputs[1]).astype(np.float64)
    stored = value(dequantize.inputs[0]).astype(np.float64)
    np.testing.assert_array_equal(stored, np.clip(np.rint(w / scales.astype(np.float32)), -128, 127))
    return ((codes - zero) * scale) @ (stored * scales)


def test_inputs_and_weights_are_rounded_and_results_are_not() -> None:
    model, record, _ = quantized(proto(NAMED, W=weights(2, K, N)), {"x": X}, calibrator="minmax")
    assert model.census() == {"QuantizeLinear": 1, "DequantizeLinear": 2, "MatMul": 1}
    assert record.detail["operators"] == {"MatMul": 1}
    wanted = exact_result(model, X, weights(2, K, N))
    found = run(model, {"x": X})["y"]
    np.testing.assert_allclose(found, wanted, atol=FLOAT * np.abs(wanted).max())
    # half a step of every input and of every weight, which minmax does not clip
    step = np.ptp(np.append(X, 0)) / 255
    w = weights(2, K, N)
    bound = step / 2 * np.abs(w).sum(0) + np.abs(X).max() * K * np.abs(w).max(0) / 127 / 2 * 1.1
    assert (np.abs(found - X @ w) <= bound).all()


def test_onnxruntime_computes_it_on_integers(tmp_path: object) -> None:
    model, _, _ = quantized(proto(NAMED, W=weights(2, K, N)), {"x": X}, target=ORT_CPU)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = f"{tmp_path}/optimized.onnx"
    session = onnxruntime.InferenceSession(
        model.to_proto().SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    import onnx

    operators = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    assert operators == ["QuantizeLinear", "MatMulIntegerToFloat"]
    (found,) = session.run(None, {"x": X})
    wanted = exact_result(model, X, weights(2, K, N))
    np.testing.assert_allclose(found, wanted, atol=FLOAT * np.abs(wanted).max())


def test_one_input_of_several_products_is_rounded_once() -> None:
    text = f"""agraph (float[m, {K}] x) => (float[m, {N}] y, float[m, {N}] z, float[m, {K}] r) {{
        y = MatMul (x, W) z = MatMul (x, V) r = Relu (x) }}"""
    model, record, _ = quantized(proto(text, W=weights(2, K, N), V=weights(3, K, N)), {"x": X})
    assert record.detail["pairs"] == 1
    assert node_of(model, "Relu").inputs[0].name == "x"  # what stays float reads the unrounded values


@pytest.mark.parametrize("trans_b", [0, 1])
def test_a_bias_is_stored_in_units_of_both_scales(trans_b: int) -> None:
    text = f"""agraph (float[m, {K}] x) => (float[m, {N}] y) {{
        y = Gemm <transB = {trans_b}, beta = 0.5> (x, W, b) }}"""
    w, b = weights(2, K, N), weights(3, N)
    model, _, _ = quantized(proto(text, W=w.T.copy() if trans_b else w, b=b), {"x": X})
    gemm = node_of(model, "Gemm")
    assert "beta" not in gemm.attrs
    bias, weight = producer(gemm.inputs[2]), producer(gemm.inputs[1])
    assert weight.attrs["axis"] == 1 - trans_b
    assert value(bias.inputs[0]).dtype == np.int32
    step, _ = parameters(producer(gemm.inputs[0]))
    units = value(bias.inputs[1])
    np.testing.assert_allclose(units, step * value(weight.inputs[1]), rtol=2**-23)
    np.testing.assert_allclose(value(bias.inputs[0]) * units.astype(np.float64), b / 2, atol=units.max())
    np.testing.assert_allclose(run(model, {"x": X})["y"], X @ w + b / 2, atol=0.2)


def test_a_bias_that_would_leave_int32_makes_the_weights_scale_larger() -> None:
    text = f"agraph (float[m, {K}] x) => (float[m, {N}] y) {{ y = Gemm (x, W, b) }}"
    w, b = weights(2, K, N), weights(3, N)
    w[:, 0], b[0] = 1e-9, 50.0  # a channel with nothing but a bias
    model, _, _ = quantized(proto(text, W=w, b=b), {"x": X})
    codes = value(producer(node_of(model, "Gemm").inputs[2]).inputs[0])
    assert np.abs(codes.astype(np.int64)).max() <= 2**30
    for optimise in (False, True):
        found = run(model, {"x": X}, optimise)["y"]
        np.testing.assert_allclose(found[:, 0], 50.0, rtol=1e-3)
        np.testing.assert_allclose(found, X @ w + b, atol=0.2)


@pytest.mark.parametrize("activations", ["uint8", "int8", "uint16", "int16"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("calibrator", ["minmax", "mse", "entropy", "percentile", "moving_average"])
def test_all_types_and_calibrators_give_the_product(activations: str, symmetric: bool, calibrator: str) -> None:
    rules = replace(PRODUCT_RULES, activations=("uint8", "int8", "uint16", "int16"))
    w = weights(2, K, N)
    options = {"activations": activations, "symmetric": symmetric, "calibrator": calibrator}
    model, record, _ = quantized(proto(NAMED, W=w), {"x": X}, target=with_rules(rules), **options)
    assert record.detail["activations"] == activations
    dequantize = producer(node_of(model, "MatMul").inputs[0])
    assert dequantize.inputs[2].dtype == np.dtype(activations)
    middle = {"uint8": 128, "int8": 0, "uint16": 32768, "int16": 0}[activations]
    if symmetric:
        assert parameters(dequantize)[1] == middle
    found = run(model, {"x": X})["y"].astype(np.float64)
    wanted = (X @ w).astype(np.float64)
    cosine = np.sum(found * wanted) / np.linalg.norm(found) / np.linalg.norm(wanted)
    assert cosine > 0.999


def test_16_bits_raise_the_opset() -> None:
    rules = replace(PRODUCT_RULES, activations=("uint16",))
    source = proto(NAMED, opset=17, ir_version=8, W=weights(2, K, N))
    model, record, _ = quantized(source, {"x": X}, target=with_rules(rules), activations="uint16")
    assert model.opset() == 21
    assert record.detail["converted_to_opset"] == 21


def test_half_precision_keeps_its_type() -> None:
    text = f"agraph (float16[m, {K}] x) => (float16[m, {N}] y) {{ y = MatMul (x, W) }}"
    w, x = weights(2, K, N, dtype=np.float16), X.astype(np.float16)
    model, record, _ = quantized(proto(text, opset=17, ir_version=8, W=w), {"x": x})
    assert record.detail["converted_to_opset"] == 19
    found = run(model, {"x": x})["y"]
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, x.astype(np.float32) @ w.astype(np.float32), atol=0.3)


def test_four_bit_weights_per_channel() -> None:
    rules = replace(PRODUCT_RULES, weights=("int8", "int4"))
    w = weights(2, K, N)
    model, _, _ = quantized(proto(NAMED, W=w), {"x": X}, target=with_rules(rules), weight_bits=4)
    dequantize = producer(node_of(model, "MatMul").inputs[1])
    codes, scales = value(dequantize.inputs[0]), value(dequantize.inputs[1])
    assert codes.dtype == ml_dtypes.int4
    near = codes.astype(np.float32) * scales
    plain = np.abs(w).max(0) / 7
    rounded = np.clip(np.rint(w / plain), -8, 7) * plain
    assert np.sum((near - w) ** 2, 0).max() <= np.sum((rounded - w) ** 2, 0).max() * 1.01


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_one_scale_for_the_whole_weight(kind: str) -> None:
    rules = replace(PRODUCT_RULES, granularity="tensor", weights=(kind,))  # type: ignore[arg-type]
    w = weights(2, K, N)
    model, _, _ = quantized(proto(NAMED, W=w), {"x": X}, target=with_rules(rules))
    dequantize = producer(node_of(model, "MatMul").inputs[1])
    assert value(dequantize.inputs[1]).shape == ()
    assert value(dequantize.inputs[0]).dtype == np.dtype(kind)
    np.testing.assert_allclose(run(model, {"x": X})["y"], X @ w, atol=0.5)


def test_weights_with_zero_points() -> None:
    rules = replace(PRODUCT_RULES, weights=("uint8",), weight_symmetric=False)
    w = weights(2, K, N) + 2
    model, _, _ = quantized(proto(NAMED, W=w), {"x": X}, target=with_rules(rules))
    dequantize = producer(node_of(model, "MatMul").inputs[1])
    zeros = value(dequantize.inputs[2])
    assert zeros.shape == (N,)
    assert (zeros < 128).all()
    np.testing.assert_allclose(run(model, {"x": X})["y"], X @ w, atol=0.5)


def test_sensitive_products_stay_float_where_there_is_nothing_wider() -> None:
    text = f"""agraph (float[m, {K}] x) => (float[m, {N}] y, float[m, {N}] z) {{
        [spiky] y = MatMul (x, W) x2 = Abs (x) s = Sqrt (x2) [smooth] z = MatMul (s, V) }}"""
    x, w = X.copy(), weights(2, K, N)
    x[:, 0] *= 3000  # a channel that is far larger than the others, and that the weight does not look at
    w[0] = 0
    source = proto(text, W=w, V=weights(3, K, N))
    model, record, _ = quantized(source, {"x": x}, sensitive_below_db=20, calibrator="minmax")
    assert "stays float" in reason(record, "spiky")
    assert record.detail["operators"] == {"MatMul": 1}
    np.testing.assert_array_equal(run(model, {"x": x})["y"], run(source, {"x": x})["y"])
    _, record, _ = quantized(source, {"x": x}, sensitive_below_db=20, float_below_db=0, calibrator="minmax")
    assert record.detail["operators"] == {"MatMul": 2}


class TestSkips:
    """One for each line of "Skips when" that is about products."""

    def skipped(self, text: str, where: str = "p", target: object = None, **more: object) -> str:
        tensors = {k: v for k, v in more.items() if isinstance(v, np.ndarray)}
        options = {k: v for k, v in more.items() if not isinstance(v, np.ndarray)}
        model, record, _ = quantized(proto(text, **tensors), {"x": X}, target=target, **options)  # type: ignore[arg-type]
        assert "QuantizeLinear" not in model.census()
        return reason(record, where)

    def test_excluded(self) -> None:
        assert "excluded by '^p$'" in self.skipped(NAMED, W=weights(2, K, N), exclude=("^p$",))

    def test_a_restriction_of_the_target(self) -> None:
        rules = replace(PRODUCT_RULES, restrictions=(lambda node, model: f"{node.op} is too hot",))
        assert self.skipped(NAMED, target=with_rules(rules), W=weights(2, K, N)) == "MatMul is too hot"

    def test_a_computed_weight(self) -> None:
        text = f"agraph (float[m, {K}] x) => (float[m, m] y) {{ t = Transpose (x) [p] y = MatMul (x, t) }}"
        assert self.skipped(text) == "its weight is computed"

    def test_weights_of_kernels_with_float_activations(self) -> None:
        text = f"""agraph (float[m, {K}] x) => (float[m, {N}] y) {{
            w = DequantizeLinear <axis = 0, block_size = 16> (W, s) [p] y = MatMul (x, w) }}"""
        codes = weights(2, K, N).astype(ml_dtypes.int4)
        assert "int4" in self.skipped(text, W=codes, s=weights(3, 2, N))

    def test_blocks(self) -> None:
        text = f"""agraph (float[m, {K}] x) => (float[m, {N}] y) {{
            w = DequantizeLinear <axis = 0, block_size = 16> (W, s) [p] y = MatMul (x, w) }}"""
        codes = weights(2, K, N).astype(np.int8)
        assert "scale per block" in self.skipped(text, W=codes, s=weights(3, 2, N))

    def test_gemm_that_transposes_or_scales(self) -> None:
        text = f"agraph (float[{K}, m] x) => (float[m, {N}] y) {{ [p] y = Gemm <transA = 1> (x, W) }}"
        model, record, _ = quantized(proto(text, W=weights(2, K, N)), {"x": X.T.copy()})
        assert "transA" in reason(record, "p")
        assert model.census() == {"Gemm": 1}
        scaled = f"agraph (float[m, {K}] x) => (float[m, {N}] y) {{ [p] y = Gemm <alpha = 2.0> (x, W) }}"
        assert "alpha" in self.skipped(scaled, W=weights(2, K, N))

    def test_a_computed_bias(self) -> None:
        text = f"agraph (float[m, {K}] x) => (float[m, {K}] y) {{ [p] y = Gemm (x, W, x) }}"
        assert self.skipped(text, W=weights(2, K, K)) == "its bias is computed"

    def test_sums_that_leave_int32(self) -> None:
        rows = 66_100
        text = NAMED.replace(f"{K}]", f"{rows}]").replace(f"{N}]", "16]")
        ones = np.ones((rows, 16), np.float32)
        model, record, _ = quantized(proto(text, W=ones), {"x": ones.T[:1].copy()})
        assert "may leave int32" in record.skipped[0].reason
        assert model.census() == {"MatMul": 1}

    def test_float_weights_that_shall_stay_float(self) -> None:
        assert "weights" in self.skipped(NAMED, W=weights(2, K, N), weight_bits=0)

    def test_a_target_without_integers(self) -> None:
        target = with_rules(None, "floats-only")
        model, record, context = quantized(proto(NAMED, W=weights(2, K, N)), {"x": X}, target=target)
        assert model.census() == {"MatMul": 1}
        assert "floats-only" in record.skipped[0].reason
        assert "stay float" in context.notes[0]

    def test_a_target_without_wide_codes(self) -> None:
        _, record, context = quantized(proto(NAMED, W=weights(2, K, N)), {"x": X}, target=ORT_CPU, activations="uint16")
        assert "16-bit" in record.skipped[0].reason
        assert "stay float" in context.notes[0]

    def test_a_subgraph(self) -> None:
        text = f"""agraph (float[m, {K}] x, bool c) => (float[m, {N}] y) {{
            y = If (c) <
                then_branch = t () => (float[m, {N}] a) {{ [p] a = MatMul (x, W) }},
                else_branch = e () => (float[m, {N}] b) {{ [q] b = MatMul (x, W) }}
            > }}"""
        source = proto(text, W=weights(2, K, N))
        _, record, _ = quantized(source, {"x": X, "c": np.array(True)})
        assert "subgraph" in reason(record, "p")


def test_another_type_of_as_many_bits_is_taken_and_said() -> None:
    rules = QdqRules(FLOAT_RESULT_PRODUCTS, ("int8",), ("int8",))
    _, record, context = quantized(proto(NAMED, W=weights(2, K, N)), {"x": X}, target=with_rules(rules))
    assert record.detail["activations"] == "int8"
    assert "int8 instead of uint8" in context.notes[0]


def test_pairs_of_types_that_a_product_may_not_have() -> None:
    rules = replace(PRODUCT_RULES, allowed_pairs=frozenset({("int8", "int8")}))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="do not go with uint8"):
        quantized(proto(NAMED, W=weights(2, K, N)), {"x": X}, target=with_rules(rules))


@pytest.mark.parametrize(
    "options",
    [
        {"activations": "uint4"},
        {"weight_bits": 5},
        {"calibrator": "best"},
        {"percentile": 20.0},
        {"exclude": ("(",)},
    ],
)
def test_impossible_options(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        QuantizeActivations(**options)  # type: ignore[arg-type]
