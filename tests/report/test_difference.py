"""The structural difference of two models."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from onnxslim_llm.ir.model import Model, from_proto
from onnxslim_llm.report.difference import structural_difference


def model(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return from_proto(proto)


def test_operators_bytes_opsets_and_ports() -> None:
    first = model(
        '<ir_version: 9, opset_import: ["" : 18]> g (float[N, 8] x) => (float[N, 8] y, float[N, 8] z) '
        "<float[8, 8] w> { a = MatMul (x, w) b = Relu (a) y = Relu (b) z = Neg (x) }",
        w=np.ones((8, 8), np.float32),
    )
    second = model(
        '<ir_version: 9, opset_import: ["" : 21, "com.microsoft" : 1]> g (float[N, 8] x, float[N, 8] s) => '
        "(float[N, 8] y) <float16[8, 8] w> { v = Cast <to = 1> (w) a = MatMul (x, v) b = Relu (a) y = Add (b, s) }",
        w=np.ones((8, 8), np.float16),
    )
    found = structural_difference(first, second)
    assert found.ops == {"Add": (0, 1), "Cast": (0, 1), "Neg": (1, 0), "Relu": (2, 1)}
    assert found.nodes == (4, 4)
    assert found.bytes_by_role == {"ffn": (256, 128)}
    assert found.weight_bytes == (256, 128)
    assert found.opset == {"": (18, 21), "com.microsoft": (None, 1)}
    assert found.inputs == ((), ("s",))
    assert found.outputs == (("z",), ())


def test_a_model_does_not_differ_from_itself() -> None:
    text = '<ir_version: 9, opset_import: ["" : 18]> g (float[N] x) => (float[N] y) { y = Relu (x) }'
    found = structural_difference(model(text), model(text))
    assert found.ops == {}
    assert found.opset == {}
    assert found.inputs == found.outputs == ((), ())
