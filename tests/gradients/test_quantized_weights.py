"""Gradients of what stands for quantized weights: they reach scales, zero points and codes that come as floats."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from gradient_models import executor_of, model_of, proto_of, runtime_results  # noqa: E402

from onnxslim_llm.gradients.executor import Executor  # noqa: E402
from onnxslim_llm.ir.weights import weight_of  # noqa: E402
from onnxslim_llm.passes.quantize.quantize_weights import QuantizeWeights  # noqa: E402
from onnxslim_llm.rewrite.pipeline import Pipeline  # noqa: E402

K, N, BLOCK = 64, 32, 16
#: Sums of 64 products of up to 8 * 3 in float32, each rounded by 6e-8 of itself.
TOLERANCE = 1e-4
BLOCKED = f"""agraph (float[m, {K}] x) => (float[m, {N}] y) {{
    W = DequantizeLinear <axis = 0, block_size = {BLOCK}> (codes, scales, zeros)
    y = MatMul (x, W)
}}"""


def dequantized(
    codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None, *, block: int = BLOCK
) -> np.ndarray:
    def spread(values: np.ndarray) -> np.ndarray:
        return np.repeat(values.astype(np.float32), block, 0)[: len(codes)]

    wide = codes.astype(np.float32)
    return (wide if zeros is None else wide - spread(zeros)) * spread(scales)


def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(5, K)).astype(np.float32)


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.uint4, np.int8, np.uint8])
def test_blocked_codes(dtype: type) -> None:
    rng = np.random.default_rng(1)
    low, high = (-8, 8) if dtype in (ml_dtypes.int4, np.int8) else (0, 16)
    weights = {
        "codes": rng.integers(low, high, (K, N)).astype(dtype),
        "scales": rng.uniform(0.1, 1, (K // BLOCK, N)).astype(np.float32),
        "zeros": rng.integers(low, high, (K // BLOCK, N)).astype(dtype),
    }
    executor = executor_of(BLOCKED, 21, **weights)
    expected = rows() @ dequantized(**weights)
    np.testing.assert_allclose(executor.run({"x": rows()})["y"], expected, rtol=TOLERANCE, atol=TOLERANCE)

    x = torch.from_numpy(rows())
    free = {name: executor.weight(name).float().requires_grad_() for name in weights}
    executor.run({"x": x}, free)["y"].square().sum().backward()
    scale, zero = (free[n].detach().repeat_interleave(BLOCK, 0) for n in ("scales", "zeros"))
    product = x @ ((free["codes"].detach() - zero) * scale)
    by_weight = x.T @ (2 * product)
    blocks = (by_weight * (free["codes"].detach() - zero)).reshape(-1, BLOCK, N).sum(1)
    torch.testing.assert_close(free["scales"].grad, blocks, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(free["codes"].grad, by_weight * scale, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        free["zeros"].grad, -(by_weight * scale).reshape(-1, BLOCK, N).sum(1), rtol=1e-4, atol=1e-3
    )


def test_the_block_product_of_a_pass_runs_as_its_body_says() -> None:
    body = f"agraph (float[m, {K}] x) => (float[m, {N}] y) {{ a = MatMul (x, W) t = Tanh (a) y = MatMul (t, V) }}"
    rng = np.random.default_rng(2)
    weights = {"W": rng.normal(size=(K, 48)).astype(np.float32), "V": rng.normal(size=(48, N)).astype(np.float32)}
    model = model_of(body, 21, **weights)
    (record,) = Pipeline([QuantizeWeights(bits=4, block=BLOCK, method="rtn", min_elements=1)]).run(model)
    assert record.changed
    executor = Executor(model)
    # Not with ONNX Runtime: it makes products with 8-bit activations of these functions.
    first, second = (
        dequantized(*(weight_of(tensor).load() for tensor in node.inputs[1:4]), block=node.attrs["block_size"])
        for node in model.graph.nodes
        if node.op == "BlockMatMul"
    )
    expected = np.tanh(rows() @ first) @ second
    np.testing.assert_allclose(executor.run({"x": rows()})["y"], expected, rtol=TOLERANCE, atol=TOLERANCE)
    node = next(n for n in model.graph.nodes if n.op == "BlockMatMul")
    scales = executor.weight(node.inputs[2].name).clone().requires_grad_()
    executor.run({"x": rows()}, {node.inputs[2].name: scales})["y"].sum().backward()
    assert scales.grad is not None
    assert (scales.grad != 0).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_quantization_per_channel_passes_gradients_straight_through(axis: int) -> None:
    body = f"""agraph (float[4, 3] x) => (float[4, 3] y) {{
        q = QuantizeLinear <axis = {axis}> (x, s, z)
        y = DequantizeLinear <axis = {axis}> (q, s, z)
    }}"""
    size = (4, 3)[axis]
    weights = {"s": np.linspace(0.01, 0.03, size).astype(np.float32), "z": np.arange(size).astype(np.int8)}
    x = 3 * np.random.default_rng(4).normal(size=(4, 3)).astype(np.float32)
    executor = executor_of(body, 19, **weights)
    expected = runtime_results(proto_of(body, 19, **weights), {"x": x})["y"]
    free = torch.tensor(x, requires_grad=True)
    found = executor.run({"x": free})["y"]
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-6, atol=1e-6)
    found.sum().backward()
    codes = np.round(x / (weights["s"].reshape(-1, 1) if axis == 0 else weights["s"]))
    codes = codes + (weights["z"].reshape(-1, 1) if axis == 0 else weights["z"])
    inside = (codes >= -128) & (codes <= 127)
    assert 0 < inside.sum() < inside.size
    np.testing.assert_allclose(free.grad, inside.astype(np.float32), rtol=1e-6)
