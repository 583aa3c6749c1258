from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser
from reference_decoder import DecoderSpec, write

from onnxslim_llm.errors import ModelError
from onnxslim_llm.verify.layers import compare_layers

HEAD = '<ir_version: 9, opset_import: ["": 18]> '


def test_equal_models(tmp_path: Path) -> None:
    path = write(DecoderSpec(), tmp_path / "m.onnx")
    found = compare_layers(path, path, threads=1)
    assert len(found.layers) > 100
    assert all(layer.max_abs == 0 for layer in found.layers)
    assert {"logits", "present.1.value"} <= {layer.name for layer in found.layers}
    json.dumps(found.to_json(), allow_nan=False)


def test_the_error_appears_where_it_is_made(tmp_path: Path) -> None:
    first = write(DecoderSpec(), tmp_path / "a.onnx")
    proto = onnx.load(first)
    tensor = next(t for t in proto.graph.initializer if t.name == "model.layers.1.mlp.up_proj.weight")
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(-1), tensor.name))
    onnx.save(proto, tmp_path / "b.onnx")
    found = compare_layers(first, tmp_path / "b.onnx", threads=1)
    up = next(n.output[0] for n in proto.graph.node if tensor.name in n.input)
    errors = {layer.name: layer for layer in found.layers}
    assert errors[up].cosine == pytest.approx(-1.0)
    assert errors[up].op == "MatMul"
    assert found.layers[0].name == up  # nothing is worse than the opposite sign
    assert errors["present.1.key"].max_abs == 0  # made before it
    assert errors["logits"].max_abs > 0  # made after it


def test_shapes_that_differ_are_skipped_and_integers_left_out(tmp_path: Path) -> None:
    body = "=> (float[C, D] y, int64[2] s) {{ m = Neg(x) y = Transpose<perm=[{}]>(m) s = Shape(x) }}"
    for name, order in (("a", "0, 1"), ("b", "1, 0")):
        onnx.save(parser.parse_model(HEAD + "g (float[A, B] x) " + body.format(order)), tmp_path / f"{name}.onnx")
    found = compare_layers(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert [layer.name for layer in found.layers] == ["m"]
    assert [name for name, _ in found.skipped] == ["y"]


def test_nothing_in_common(tmp_path: Path) -> None:
    onnx.save(parser.parse_model(HEAD + "g (float[A] x) => (float[A] y) { y = Neg(x) }"), tmp_path / "a.onnx")
    onnx.save(parser.parse_model(HEAD + "g (float[A] x) => (float[A] z) { z = Neg(x) }"), tmp_path / "b.onnx")
    with pytest.raises(ModelError, match="share no floating-point tensor") as caught:
        compare_layers(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert "--no-run" in caught.value.todo
