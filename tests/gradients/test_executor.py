"""The executor's interface: values in place of weights, cuts in the middle, branches, and what is refused."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")

from gradient_models import executor_of, model_of, proto_of, runtime_results  # noqa: E402

from onnxslim_llm.errors import ModelError, UsageError  # noqa: E402
from onnxslim_llm.gradients.executor import Executor, unsupported  # noqa: E402
from onnxslim_llm.gradients.tensors import as_tensor  # noqa: E402
from onnxslim_llm.ir.model import open_model  # noqa: E402

TWO = "agraph (float[m, 3] x) => (float[m, 2] y) { a = MatMul (x, W) b = Tanh (a) y = MatMul (b, V) }"


def two() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"W": rng.normal(size=(3, 4)).astype(np.float32), "V": rng.normal(size=(4, 2)).astype(np.float32)}


def rows() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)


def test_values_replace_initializers_and_receive_gradients() -> None:
    weights, x = two(), torch.from_numpy(rows())
    executor = executor_of(TWO, **weights)
    w = torch.zeros(3, 4, requires_grad=True)
    y = executor.run({"x": x}, {"W": w})["y"]
    assert (y == 0).all()
    y.sum().backward()
    assert w.grad is not None
    torch.testing.assert_close(w.grad, x.sum(0)[:, None] * torch.from_numpy(weights["V"]).sum(1))


def test_a_graph_can_be_cut_anywhere() -> None:
    weights, x = two(), rows()
    executor = executor_of(TWO, **weights)
    whole = executor.run({"x": x}, outputs=["a", "y"])
    assert set(whole) == {"a", "y"}
    torch.testing.assert_close(executor.run({"a": whole["a"]})["y"], whole["y"])


def test_a_weight_of_sixteen_bits_is_computed_in_float32(tmp_path: Path) -> None:
    text = "agraph (float16[m, 3] x) => (float16[m, 2] y) { y = MatMul (x, W) }"
    weight = np.random.default_rng(2).normal(size=(3, 2)).astype(np.float16)
    onnx.save(proto_of(text, W=weight), tmp_path / "half.onnx")
    executor = Executor(open_model(tmp_path / "half.onnx"))
    x = rows().astype(np.float16)
    found = executor.run({"x": x})["y"]
    assert found.dtype is torch.float32
    np.testing.assert_allclose(found, x.astype(np.float64) @ weight.astype(np.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [1, 4])
def test_branches(length: int) -> None:
    text = """agraph (float[m, 3] x) => (float[m, 3] y) {
        n = Shape <end = 1> (x) one = Constant <value_ints = [1]> () c = Greater (n, one) s = Squeeze (c)
        y = If (s) <
            then_branch = many () => (float[m, 3] t) { t = Mul (x, factor) },
            else_branch = few () => (float[m, 3] e) { e = Neg (x) }
        >
    }"""
    factor = np.array(3, np.float32)
    x = rows()[:length]
    found = executor_of(text, factor=factor).run({"x": x})["y"]
    np.testing.assert_allclose(found, runtime_results(proto_of(text, factor=factor), {"x": x})["y"], rtol=1e-6)


def test_operators_without_a_rule_are_named() -> None:
    text = "agraph (float[m, 3] x) => (float[m, 3] y) { a = Hardmax (x) y = Neg (a) }"
    model = model_of(text)
    assert unsupported(model) == [("a", "Hardmax")]
    with pytest.raises(ModelError, match="Hardmax has no rule") as caught:
        Executor(model).run({"x": rows()})
    assert "'a'" in caught.value.where


def test_an_operator_that_nobody_needs_is_no_hindrance() -> None:
    text = "agraph (float[m, 3] x) => (float[m, 3] y, float[m, 3] h) { h = Hardmax (x) y = Neg (x) }"
    executor = executor_of(text)
    assert executor.unsupported(["y"]) == []
    np.testing.assert_array_equal(executor.run({"x": rows()}, outputs=["y"])["y"], -rows())


def test_bad_calls_say_what_is_wrong() -> None:
    executor = executor_of(TWO, **two())
    with pytest.raises(UsageError, match="input 'x' is needed"):
        executor.run({})
    with pytest.raises(UsageError, match="no tensor 'z'"):
        executor.run({"x": rows()}, outputs=["z"])
    with pytest.raises(UsageError, match="no initializer 'a'"):
        executor.weight("a")
    with pytest.raises(ModelError, match="MatMul cannot be computed"):
        executor.run({"x": rows()[:, :2]})


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "bfloat16", "float16"])
def test_short_floats_are_widened_exactly(kind: str) -> None:
    array = np.array([0.5, -1.75, 0], ml_dtypes.finfo(kind).dtype if kind != "float16" else np.float16)
    found = as_tensor(array)
    assert found.dtype is torch.float32
    assert found.tolist() == [0.5, -1.75, 0.0]


def test_strings_are_refused() -> None:
    with pytest.raises(ModelError, match="cannot be computed through values of type"):
        as_tensor(np.array(["a"]))
