"""Inputs that are rounded when they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from block_models import fused, model_of, proto, weights
from qdq_checks import INTEGER_PROCESSOR, run

from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import Model
from onnxslim_llm.passes.qdq.quantize_dynamically import QuantizeDynamically
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import PassRecord, Pipeline
from onnxslim_llm.targets import Target
from onnxslim_llm.targets.ort_cpu import ORT_CPU

K, N = 32, 24
X = weights(1, 5, K)
W = weights(2, K, N)
PRODUCT = f"agraph (float[m, {K}] x) => (float[m, {N}] y) {{ [p] y = MatMul (x, W) }}"
#: The kernel multiplies the scales first, onnx's form rounds in between: some units of 2^-24.
FLOAT = 1e-5


def dynamic(source: onnx.ModelProto, target: Target | None = ORT_CPU, **options: Any) -> tuple[Model, PassRecord]:
    model = model_of(source)
    (record,) = Pipeline([QuantizeDynamically(**options)]).run(model, Context(target=target))
    onnx.checker.check_model(model.to_proto(), full_check=True)
    return model, record


def expected(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    low, high = min(x.min(), 0), max(x.max(), 0)
    step = np.float32((high - low) / 255)
    zero = np.clip(np.rint(-low / step), 0, 255)
    codes = np.clip(np.rint(x / step) + zero, 0, 255)
    scales = (np.abs(w).max(0) / 127).astype(np.float32)
    return (((codes - zero) @ np.rint(w / scales)) * step * scales).astype(np.float32)


@pytest.mark.parametrize("optimise", [False, True])
def test_the_product_of_rounded_operands(optimise: bool) -> None:
    model, record = dynamic(proto(PRODUCT, W=W))
    assert record.detail["products"] == 1
    found = run(model, {"x": X}, optimise)["y"]
    np.testing.assert_allclose(found, expected(X, W), rtol=FLOAT, atol=FLOAT)


def test_onnxruntime_makes_one_kernel_of_it(tmp_path: Path) -> None:
    model, _ = dynamic(proto(PRODUCT, W=W))
    assert fused(model.to_proto(), tmp_path) == {"DynamicQuantizeMatMul": 1}


def test_one_input_is_rounded_once() -> None:
    text = PRODUCT.replace("=> (", f"=> (float[m, {N}] z, ").replace("{ [p]", "{ z = MatMul (x, V) [p]")
    model, _ = dynamic(proto(text, W=W, V=weights(3, K, N)))
    assert model.census()["DynamicQuantizeLinear"] == 1
    assert model.census()["MatMulInteger"] == 2


@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm_keeps_its_bias(trans_b: int) -> None:
    text = f"""agraph (float[m, {K}] x) => (float[m, {N}] y) {{
        y = Gemm <transB = {trans_b}, beta = 2.0> (x, W, b) }}"""
    b = weights(3, N)
    source = proto(text, opset=10, ir_version=5, W=W.T.copy() if trans_b else W, b=b)
    model, record = dynamic(source)
    assert record.detail["converted_to_opset"] == 11
    found = run(model, {"x": X})["y"]
    np.testing.assert_allclose(found, expected(X, W) + 2 * b, rtol=FLOAT, atol=FLOAT)


def test_a_weight_seen_through_a_transpose_is_stored_turned() -> None:
    text = f"agraph (float[m, {K}] x) => (float[m, {N}] y) {{ t = Transpose (W) y = MatMul (x, t) }}"
    model, _ = dynamic(proto(text, W=W.T.copy()))
    assert "Transpose" not in model.census()
    np.testing.assert_allclose(run(model, {"x": X})["y"], expected(X, W), rtol=FLOAT, atol=FLOAT)


class TestSkips:
    def reason(self, text: str, **more: Any) -> str:
        options = {"exclude": more.pop("exclude", ())}
        model, record = dynamic(proto(text, **more), **options)
        assert "MatMulInteger" not in model.census()
        return record.skipped[0].reason

    def test_excluded(self) -> None:
        assert "excluded" in self.reason(PRODUCT, W=W, exclude=("p",))

    def test_computed_weights(self) -> None:
        assert "computed" in self.reason(f"agraph (float[{K}, {K}] x) => (float[{K}, {K}] y) {{ y = MatMul (x, x) }}")

    def test_other_types(self) -> None:
        assert "float32 only" in self.reason(PRODUCT.replace("float[", "float16["), W=W.astype(np.float16))

    def test_what_is_quantized_already(self) -> None:
        text = f"""agraph (float[m, {K}] x) => (float[m, {N}] y) {{
            w = DequantizeLinear <axis = 1> (W, s) y = MatMul (x, w) }}"""
        assert "quantized already" in self.reason(text, W=W.astype(np.int8), s=np.ones(N, np.float32))


@pytest.mark.parametrize("target", [INTEGER_PROCESSOR])
def test_targets_with_fixed_ranges_refuse(target: Target) -> None:
    with pytest.raises(UsageError, match="cannot choose ranges"):
        dynamic(proto(PRODUCT, W=W), target)
