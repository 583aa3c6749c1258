"""`fold_constant_neurons`: channels that never change go into a bias, and only as many as the limit allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from block_models import model_of, proto, run, skipped, weights

from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.save import save_model
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.passes.prune.fold_constant_neurons import FoldConstantNeurons
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import PassRecord, Pipeline
from onnxslim_llm.stats.calibration import TensorCalibration
from onnxslim_llm.stats.collect import collect
from onnxslim_llm.stats.statistics import Statistics

WIDTH, HIDDEN = 16, 64
HEAD = "agraph (float[b, s, 16] x) => (float[b, s, 16] y) {"
MAKE = "u = MatMul (x, U) v = Add (u, bias) h = Relu (v)"
MATMUL = f"{HEAD} {MAKE} y = MatMul (h, D) }}"
ADDED = f"{HEAD} {MAKE} d = MatMul (h, D) y = Add (out, d) }}"
GEMM = """agraph (float[b, 16] x) => (float[b, 16] y) {
    v = Gemm (x, U, bias)
    h = Relu (v)
    y = Gemm <alpha = 0.5, transB = 1> (h, D, out)
}"""
SCALED = GEMM.replace("alpha = 0.5", "alpha = 0.5, beta = 2.0")
#: Sums in other orders, in float32, of some 64 terms of size 1.
ROUNDING = 1e-4
CONSTANT, DEAD = slice(0, 8), slice(8, 16)


def source_of(text: str, wobble: float = 0.0) -> onnx.ModelProto:
    """A layer with 8 channels that are 3 for every input, up to `wobble`, and 8 whose ReLU never fires."""
    up, bias = weights(1, WIDTH, HIDDEN), weights(3, HIDDEN)
    up[:, CONSTANT] *= wobble
    bias[CONSTANT], bias[DEAD] = 3.0, -100.0
    down = weights(2, HIDDEN, WIDTH)
    tensors = {"U": up, "bias": bias, "D": np.ascontiguousarray(down.T) if "transB" in text else down}
    return proto(text, **tensors, **({"out": weights(4, WIDTH)} if "out" in text else {}))


def feeds(source: onnx.ModelProto, seed: int, rows: int = 100) -> dict[str, np.ndarray]:
    flat = len(source.graph.input[0].type.tensor_type.shape.dim) == 2
    return {"x": weights(seed, *(() if flat else (1,)), rows, WIDTH)}


def statistics_of(source: onnx.ModelProto, folder: Path) -> Statistics:
    path = folder / "model.onnx"
    onnx.save(source, path)
    data = TensorCalibration(tuple(feeds(source, seed) for seed in range(10)))
    return collect(path, "m", data, folder / "statistics")[0]


def folded(source: onnx.ModelProto, folder: Path, **options: Any) -> tuple[Model, PassRecord]:
    model = model_of(source)
    context = Context(statistics=statistics_of(source, folder))
    (record,) = Pipeline([FoldConstantNeurons(**{"align": 1, **options})]).run(model, context)
    return model, record


def results(source: onnx.ModelProto, model: Model, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    save_model(model, folder / "folded.onnx")
    x = feeds(source, 99, 500)
    return run(source, x), run(folder / "folded.onnx", x)


@pytest.mark.parametrize("text", [MATMUL, ADDED, GEMM, SCALED], ids=["matmul", "added", "gemm", "scaled"])
def test_constant_channels_go_without_a_loss(tmp_path: Path, text: str) -> None:
    source = source_of(text)
    model, record = folded(source, tmp_path)
    assert record.detail["layers"][0]["channels"] == [HIDDEN, HIDDEN - 16]
    tensors = model.graph.tensors()
    assert weight_of(tensors["U"]).shape == (WIDTH, HIDDEN - 16)
    assert sorted(weight_of(tensors["D"]).shape) == [WIDTH, HIDDEN - 16]
    assert weight_of(tensors["bias"]).shape == (HIDDEN - 16,)
    expected, found = results(source, model, tmp_path)
    np.testing.assert_allclose(found, expected, atol=ROUNDING)


def test_a_bias_is_added_only_where_there_is_none(tmp_path: Path) -> None:
    for text, added in ((MATMUL, 1), (ADDED, 0), (GEMM, 0), (SCALED, 1)):
        source = source_of(text)
        model, _ = folded(source, tmp_path)
        assert len(model.graph.nodes) - len(source.graph.node) == added


def test_channels_that_are_always_zero_need_no_bias(tmp_path: Path) -> None:
    source = source_of(MATMUL, wobble=1.0)
    model, record = folded(source, tmp_path, limit=0.0)
    assert record.detail["layers"] == [{"name": "D", "channels": [HIDDEN, HIDDEN - 8], "relative_output_error": 0.0}]
    assert [n.op for n in model.graph.nodes] == [n.op_type for n in source.graph.node]
    expected, found = results(source, model, tmp_path)
    np.testing.assert_allclose(found, expected, atol=ROUNDING)


def test_the_limit_bounds_the_error_on_inputs_that_were_not_seen(tmp_path: Path) -> None:
    source = source_of(MATMUL, wobble=0.02)
    sizes = []
    for limit in (0.0, 0.003, 0.01, 0.05):
        model, record = folded(source, tmp_path, limit=limit)
        entry = record.detail["layers"][0]
        sizes.append(entry["channels"][1])
        expected, found = results(source, model, tmp_path)
        measured = np.sqrt(np.square(found - expected).mean() / np.square(expected - expected.mean((0, 1))).mean())
        assert entry["relative_output_error"] <= limit
        # Other inputs of the same kind: the mean of 500 squares is within 20 % or so of what it is expected to be.
        assert measured <= 1.2 * limit + ROUNDING
    assert sizes[0] == HIDDEN - 8
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == HIDDEN - 16


def test_the_mean_matters(tmp_path: Path) -> None:
    """The same channels without their mean in the bias would be far off."""
    source = source_of(MATMUL)
    model, _ = folded(source, tmp_path)
    expected, found = results(source, model, tmp_path)
    bias = next(n for n in model.graph.nodes if n.op == "Add" and n.outputs[0].name == "y").inputs[1]
    without = found - weight_of(bias).load()
    assert np.abs(without - expected).max() > 100 * np.abs(found - expected).max()


def test_the_number_that_is_left_is_rounded_up(tmp_path: Path) -> None:
    source = source_of(MATMUL)
    _, record = folded(source, tmp_path, align=10)
    assert record.detail["layers"][0]["channels"] == [HIDDEN, 50]
    _, record = folded(source, tmp_path, align=32)
    assert skipped(record)["D"] == "fewer than 32 of 64 channels hardly vary"


def test_later_passes_see_the_inputs_that_are_left(tmp_path: Path) -> None:
    source = source_of(MATMUL)
    context = Context(statistics=statistics_of(source, tmp_path))
    Pipeline([FoldConstantNeurons(align=1), FoldConstantNeurons(align=1)]).run(model_of(source), context)
    assert context.statistics is not None
    moments = context.statistics.of_weight("D")
    assert moments is not None
    assert moments.size == HIDDEN - 16
    assert moments.load().fit.variance.min() > 0


def test_layers_that_vary_or_are_excluded_stay(tmp_path: Path) -> None:
    source = proto(MATMUL, U=weights(1, WIDTH, HIDDEN), bias=weights(3, HIDDEN), D=weights(2, HIDDEN, WIDTH))
    _, record = folded(source, tmp_path)
    assert not record.changed
    assert skipped(record)["D"] == "fewer than 1 of 64 channels hardly vary"
    _, record = folded(source_of(MATMUL), tmp_path, exclude=("^D$",))
    assert skipped(record)["D"] == "it is excluded by '^D$'"


def test_a_layer_that_no_data_reach_stays(tmp_path: Path) -> None:
    other = source_of(MATMUL)
    for tensor in other.graph.initializer:
        tensor.name = tensor.name + "_other"
    for node in other.graph.node:
        node.input[:] = [name + "_other" if name in ("U", "D", "bias") else name for name in node.input]
    model = model_of(other)
    context = Context(statistics=statistics_of(source_of(MATMUL), tmp_path))
    (record,) = Pipeline([FoldConstantNeurons(align=1)]).run(model, context)
    assert skipped(record)["D_other"] == "no calibration data reach it"


@pytest.mark.parametrize("options", [{"limit": 1.0}, {"limit": -0.1}, {"align": 0}, {"exclude": ("(",)}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        FoldConstantNeurons(**options)


def test_data_are_asked_for() -> None:
    with pytest.raises(UsageError, match="told by calibration data"):
        Pipeline([FoldConstantNeurons()]).run(model_of(source_of(MATMUL)))
