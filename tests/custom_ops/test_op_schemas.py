"""The operators as the onnx package knows them."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from onnx import parser

import onnxslim_llm
from onnxslim_llm.custom_ops import ops

MODEL = """<ir_version: 10, opset_import: ["" : 21, "onnxslim_llm.ops" : 1]>
    g (float[b, 3, 70] a, float16[b, s, 70] h, int64[b, s] i, uint8[100] B) => (float y, float16 z, float e) {
        y = onnxslim_llm.ops.MatMulPacked <K = 70, N = 34, bits = 4, block_size = 32, activation = "silu_gate"> (a, B)
        z = onnxslim_llm.ops.MatMulPacked <K = 70, N = 34, bits = 4, block_size = 32> (h, B)
        e = onnxslim_llm.ops.GatherPacked <K = 70, N = 34, bits = 4, block_size = 32> (B, i)
    }"""


def inferred(text: str) -> dict[str, tuple[int, list[Any]]]:
    ops.register_schemas()
    proto = parser.parse_model(text)
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    found = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    return {
        o.name: (o.type.tensor_type.elem_type, [d.dim_value or d.dim_param for d in o.type.tensor_type.shape.dim])
        for o in found.graph.output
    }


def test_types_and_shapes_are_inferred() -> None:
    assert inferred(MODEL) == {
        "y": (onnx.TensorProto.FLOAT, ["b", 3, 17]),
        "z": (onnx.TensorProto.FLOAT16, ["b", "s", 34]),
        "e": (onnx.TensorProto.FLOAT, ["b", "s", 70]),
    }


def test_schemas_can_be_registered_twice() -> None:
    ops.register_schemas()
    ops.register_schemas()
    assert onnx.defs.get_schema("MatMulPacked", domain=ops.DOMAIN).since_version == ops.VERSION


def test_attributes_without_a_default_are_required() -> None:
    attributes = onnx.defs.get_schema("MatMulPacked", domain=ops.DOMAIN).attributes
    assert {name for name, a in attributes.items() if a.required} == {"K", "N", "bits", "block_size"}
    assert attributes["accuracy"].default_value.s == b"int8"


def test_the_public_face_registers() -> None:
    assert onnxslim_llm.register_custom_ops is ops.register


def test_a_missing_library_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "LIBRARY_NAME", "libno_such_library.so")
    with pytest.raises(RuntimeError, match="compile the model for the target ort-cpu"):
        ops.register(None)  # type: ignore[arg-type]
