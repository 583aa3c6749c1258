"""What each layer lost, as a compile measures it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim_llm.artifact.manifest import LayerError
from onnxslim_llm.compiler.diagnosis import measure_layers
from onnxslim_llm.compiler.flow import compile as compile_model
from onnxslim_llm.recipe import Recipe

K = 64


def chain(path: Path, noise: float = 0.0) -> Path:
    """Write y = relu(x A) B, with noise in B."""
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((K, K)).astype(np.float32) for name in "AB"}
    weights["B"] += noise * rng.standard_normal((K, K)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "A"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "B"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", K]) for name in ("x", "y")]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def test_the_error_is_that_of_the_products_output(tmp_path: Path) -> None:
    layers = [LayerError(name=name, relative_error=0.1) for name in ("A", "B", "unknown")]
    source, artifact = chain(tmp_path / "a.onnx"), chain(tmp_path / "b.onnx", noise=0.1)
    a, b, unknown = measure_layers(layers, source, artifact, None, 1)
    assert a.sqnr_db is not None
    assert a.sqnr_db > 100  # the same weight, the same input
    assert b.sqnr_db == pytest.approx(20, abs=2)  # noise of a tenth of a weight with independent elements
    assert unknown.sqnr_db is None


def test_a_compile_tells_prediction_measurement_and_reason(tmp_path: Path) -> None:
    source = chain(tmp_path / "a.onnx")
    np.savez(tmp_path / "in.npz", x=np.random.default_rng(1).standard_normal((256, K)).astype(np.float32))
    step = {"name": "quantize_weights", "method": "calibrated", "min_elements": 16, "sensitive_bits": 4}
    recipe = Recipe.model_validate({"name": "test", "gates": "int4", "passes": [step]})
    layers = compile_model(source, tmp_path / "out", recipe=recipe, calib=tmp_path / "in.npz").manifest.layers
    by_name = {layer.name: layer for layer in layers}
    assert {name: layer.bits for name, layer in by_name.items()} == {"A": 4, "B": 8}
    for layer in layers:
        assert layer.predicted_error is not None
        assert layer.sqnr_db is not None
        measured = 10 ** (-layer.sqnr_db / 20)
        if layer.name == "A":  # B's input has the error of A in it already
            assert measured == pytest.approx(layer.predicted_error, rel=0.5)  # other inputs than those of calibration
        else:
            assert measured > layer.predicted_error
    assert by_name["A"].reason == ""
    assert "classifier" in by_name["B"].reason
