"""Calibration data that are wrong, odd or too few: an error that says so, or a note and a result no worse than RTN."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim_llm.compiler.calibration import SELF, Calibrator
from onnxslim_llm.compiler.flow import compile as compile_model
from onnxslim_llm.compiler.progress import Silent
from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.recipe import Recipe
from onnxslim_llm.runtime.session import open_session

K, N = 128, 96
#: The runtime sums the products of both artifacts in its own order.
ROUNDING = 1e-4
GERMAN = (
    "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist Verpflichtung aller staatlichen Gewalt. "
    "Das Deutsche Volk bekennt sich darum zu unverletzlichen und unveräußerlichen Menschenrechten. "
)


def two_layers(path: Path, scale: float = 1.0) -> Path:
    """Write y = relu(x A) B; A makes half of its outputs negative where x is positive."""
    rng = np.random.default_rng(0)
    a = np.abs(rng.standard_normal((K, K))).astype(np.float32)
    a[:, : K // 2] *= -1
    b = rng.standard_normal((K, N)).astype(np.float32) * scale
    nodes = [
        helper.make_node("MatMul", ["x", "A"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "B"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", N])],
        [numpy_helper.from_array(a, "A"), numpy_helper.from_array(b, "B")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def recipe(method: str) -> Recipe:
    step = {"name": "quantize_weights", "method": method, "lm_head_bits": 4, "sensitive_bits": 4}
    return Recipe.model_validate({"name": "test", "gates": "int4", "passes": [step]})


def errors(model: Path, data: Path, rows: np.ndarray, folder: Path) -> dict[str, float]:
    """Return the mean squared error of the artifact's output on `rows`, by method, and check the notes."""
    expected = open_session(model).run({"x": rows})["y"]
    found = {}
    for method in ("rtn", "calibrated"):
        given = data if method == "calibrated" else None
        result = compile_model(model, folder / method, recipe=recipe(method), calib=given, verify="off", jobs=1)
        got = open_session(result.path / "model.onnx", optimise=False).run({"x": rows})["y"]
        assert np.isfinite(got).all()
        found[method] = float(np.square(got - expected).mean())
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return two_layers(tmp_path / "two.onnx")


def calibrator(model: Path, data: Path, folder: Path) -> Calibrator:
    return Calibrator(model, data, folder / "statistics", 1, Silent())


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "blank.jsonl"])
def test_an_empty_file(sample_dir: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\n\n" if name.startswith("blank") else "")
    with pytest.raises(UsageError, match="no tokens") as caught:
        calibrator(sample_dir / "model.onnx", tmp_path / name, tmp_path).statistics()
    assert caught.value.todo


def test_an_empty_folder(sample_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(UsageError):
        calibrator(sample_dir / "model.onnx", tmp_path / "data", tmp_path).statistics()


@pytest.mark.parametrize("token", [-1, 2048, 10**12])
def test_ids_outside_of_the_vocabulary(sample_dir: Path, tmp_path: Path, token: int) -> None:
    (tmp_path / "ids.jsonl").write_text(json.dumps({"tokens": [1, token, 2]}))
    with pytest.raises(UsageError, match=f"token id {token} lies outside of the model's vocabulary of 2048"):
        calibrator(sample_dir / "model.onnx", tmp_path / "ids.jsonl", tmp_path).statistics()


@pytest.mark.parametrize("names", [["z"], ["x", "z"], []], ids=["wrong", "too many", "none"])
def test_wrong_names_of_arrays(model: Path, tmp_path: Path, names: list[str]) -> None:
    np.savez(tmp_path / "in.npz", **{name: np.ones((2, K), np.float32) for name in names})
    with pytest.raises(UsageError, match="the model takes x") as caught:
        calibrator(model, tmp_path / "in.npz", tmp_path).statistics()
    assert "in.npz" in caught.value.where
    assert "numpy.savez" in caught.value.todo


def test_text_for_a_model_that_takes_none(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text")
    with pytest.raises(UsageError, match="text cannot be fed to this model") as caught:
        calibrator(model, tmp_path / "text.txt", tmp_path).statistics()
    assert ".npz" in caught.value.todo


def test_text_in_another_language_is_noted(sample_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "german.txt").write_text(GERMAN, encoding="utf-8")
    (tmp_path / "python.txt").write_text((sample_dir / "heldout.txt").read_text(encoding="utf-8")[:4000])
    told = {}
    for name in ("german", "python"):
        found = calibrator(sample_dir / "model.onnx", tmp_path / f"{name}.txt", tmp_path / name)
        found.statistics()
        told[name] = [note for note in found.notes if "not what the model knows" in note]
    assert len(told["german"]) == 1
    assert "nats" in told["german"][0]
    assert not told["python"]


def test_fewer_tokens_than_channels_are_noted_and_no_worse_than_rtn(model: Path, tmp_path: Path) -> None:
    rows = np.random.default_rng(1).random((3, K), np.float32)
    np.savez(tmp_path / "in.npz", x=rows)  # H has rank 3 of 128
    found = calibrator(model, tmp_path / "in.npz", tmp_path)
    found.statistics()
    assert any("only 3 calibration tokens for K = 128" in note for note in found.notes)
    error = errors(model, tmp_path / "in.npz", rows, tmp_path)
    assert error["calibrated"] <= error["rtn"] * (1 + ROUNDING)


def test_second_moments_that_are_not_positive_definite(model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    data = tmp_path / "data"
    data.mkdir()
    rows = np.abs(rng.standard_normal((4 * K, 2)) @ rng.standard_normal((2, K))).astype(np.float32)
    rows[:, ::3] = rows[:, 1:2]  # many equal channels, plenty of tokens
    for i, piece in enumerate(np.split(rows, 8)):
        np.savez(data / f"{i}.npz", x=piece)
    error = errors(model, data, rows, tmp_path)
    assert error["calibrated"] <= error["rtn"] * (1 + ROUNDING)


def test_a_layer_that_never_fires_is_noted_and_no_worse_than_rtn(model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.zeros((2 * K, K), np.float32))
    found = calibrator(model, tmp_path / "in.npz", tmp_path)
    found.statistics()
    assert sum("zero on all calibration data" in note for note in found.notes) == 2
    other = np.random.default_rng(3).random((64, K), np.float32)  # it fires later, when the model is in use
    error = errors(model, tmp_path / "in.npz", other, tmp_path)
    assert error["calibrated"] <= error["rtn"] * (1 + ROUNDING)
    manifest = json.loads((tmp_path / "calibrated" / "manifest.json").read_text())
    assert any("zero on all calibration data" in note for note in manifest["notes"])


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_activations_that_are_not_finite_name_the_tensor(model: Path, tmp_path: Path, value: float) -> None:
    np.savez(tmp_path / "in.npz", x=np.full((2, K), value, np.float32))
    with pytest.raises(ModelError, match="NaN or infinite values") as caught:
        calibrator(model, tmp_path / "in.npz", tmp_path).statistics()
    assert "'x'" in caught.value.where
    assert caught.value.todo


def test_activations_that_overflow_inside_name_the_tensor(tmp_path: Path) -> None:
    path = two_layers(tmp_path / "two.onnx")
    np.savez(tmp_path / "in.npz", x=np.full((2, K), 1e17, np.float32))
    with pytest.raises(ModelError, match="squares overflow") as caught:
        calibrator(path, tmp_path / "in.npz", tmp_path).statistics()
    assert "tensor 'r'" in caught.value.where


def test_arrays_of_several_kinds_and_an_encoder(sample_dir: Path, model: Path, tmp_path: Path) -> None:
    rows = np.random.default_rng(4).random((K, K), np.float32)
    np.save(tmp_path / "a.npy", rows)
    np.savez(tmp_path / "b.npz", x=rows)
    squares = []
    for name in ("a.npy", "b.npz"):
        statistics = calibrator(model, tmp_path / name, tmp_path / name.replace(".", "")).statistics()
        assert statistics is not None
        stored = statistics.of_weight("B")
        assert stored is not None
        squares.append(stored.load().fit.square)
    assert np.array_equal(*squares)
    assert (squares[0][: K // 2] == 0).all()
    assert (squares[0][K // 2 :] > 0).all()


def test_what_the_model_wrote_is_kept_for_a_compile_that_goes_on(
    sample_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxslim_llm.compiler.own_text.FEWEST_TOKENS", 64)
    monkeypatch.setattr("onnxslim_llm.compiler.own_text.MOST_TOKENS", 64)
    monkeypatch.setattr("onnxslim_llm.compiler.calibration.WINDOW", 8)
    first = calibrator(sample_dir / "model.onnx", Path(SELF), tmp_path)
    assert first.statistics() is not None
    monkeypatch.setattr("onnxslim_llm.compiler.own_text.written_by", None)  # calling it would fail
    again = calibrator(sample_dir / "model.onnx", Path(SELF), tmp_path)
    assert again.statistics() is not None
    again.discard()
