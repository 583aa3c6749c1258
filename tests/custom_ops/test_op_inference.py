"""What ONNX Runtime knows of shapes before anything runs, and what its optimizer makes of that."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from op_models import Array, attributes, model, needs_library, packed_weight

from onnxslim_llm.custom_ops import ops
from onnxslim_llm.custom_ops.packed import PackedScheme

pytestmark = needs_library

SCHEME = PackedScheme(rows=96, columns=40, bits=4, block=32)
FLOAT = TensorProto.FLOAT
TOKENS = np.zeros((2, 3), np.int64)


def shapes_of(proto: onnx.ModelProto, feeds: dict[str, Array], nameless: set[int]) -> tuple[list[int], list[int]]:
    """What Shape says of the result with ONNX Runtime's optimizer at work, and the result's true shape.

    Dimensions `nameless` of the only input have neither a size nor a name.
    """
    for axis in nameless:
        proto.graph.input[0].type.tensor_type.shape.dim[axis].Clear()
    proto.graph.node.append(helper.make_node("Shape", ["y"], ["said"]))
    proto.graph.output.append(helper.make_tensor_value_info("said", TensorProto.INT64, [None]))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    ops.register(options)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result, said = session.run(["y", "said"], feeds)
    return said.tolist(), list(result.shape)


@pytest.mark.parametrize("nameless", [set(), {0}, {1}, {0, 1}])
def test_sizes_without_a_name_stay_unknown(nameless: set[int]) -> None:
    table = {"B": packed_weight(SCHEME)}
    a = np.ones((2, 3, 96), np.float32)
    plain: dict[str, Any] = attributes(SCHEME)
    cases = [
        (model("MatMulPacked", {"a": a}, table, FLOAT, **plain), {"a": a}),
        (model("GatherPacked", {"i": TOKENS}, table, FLOAT, inputs=["B", "i"], **plain), {"i": TOKENS}),
        (model("EmptyNode", {"a": a}, {}, FLOAT, parallel=0), {"a": a}),
    ]
    for proto, feeds in cases:
        said, true = shapes_of(proto, feeds, nameless)
        assert said == true


def test_two_sizes_without_a_name_may_differ() -> None:
    """Were they given one name, ONNX Runtime could take the memory of one result for the other."""
    given = {"a": np.ones((2, 96), np.float32), "b": np.ones((5, 96), np.float32)}
    proto = model("MatMulPacked", {"a": given["a"]}, {"B": packed_weight(SCHEME)}, FLOAT, **attributes(SCHEME))
    other = model("MatMulPacked", {"b": given["b"]}, {"B": packed_weight(SCHEME)}, FLOAT, **attributes(SCHEME))
    other.graph.node[0].name = other.graph.node[0].output[0] = other.graph.output[0].name = "z"
    for part in (proto, other):
        part.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    proto.graph.node.append(other.graph.node[0])
    proto.graph.input.append(other.graph.input[0])
    proto.graph.output.append(other.graph.output[0])
    options = onnxruntime.SessionOptions()
    ops.register(options)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.shape[0] for output in session.get_outputs()]
    assert len(set(names)) == len(names) == 2
    assert [result.shape for result in session.run(None, given)] == [(2, 40), (5, 40)]
