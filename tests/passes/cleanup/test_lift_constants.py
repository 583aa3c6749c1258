from __future__ import annotations

import numpy as np
import onnx
import pytest
from cleanup_graphs import apply, graph, initializers, model_of, ops, reasons

from onnxslim_llm.passes.cleanup.lift_constants import LiftConstants
from onnxslim_llm.rewrite.context import Context


@pytest.mark.parametrize(
    ("attribute", "kind", "value"),
    [
        ("value = float[2] {1.5, 2.5}", "float", np.array([1.5, 2.5], np.float32)),
        ("value_float = 1.5", "float", np.array(1.5, np.float32)),
        ("value_floats = [1.5, 2.5]", "float", np.array([1.5, 2.5], np.float32)),
        ("value_int = 7", "int64", np.array(7, np.int64)),
        ("value_ints = [7, 8]", "int64", np.array([7, 8], np.int64)),
    ],
)
def test_every_form_of_number(attribute: str, kind: str, value: np.ndarray) -> None:
    text = f"g ({kind}[2] x) => ({kind}[2] y) {{ c = Constant <{attribute}> ()  y = Add (x, c) }}"
    after, change = apply(LiftConstants(), graph(text))
    assert ops(after) == {"Add": 1}
    np.testing.assert_array_equal(initializers(after)["c"], value, strict=True)
    assert change.sites == ["c"]


def test_a_constant_that_is_an_output_stays() -> None:
    after, change = apply(LiftConstants(), graph("g () => (float[1] y) { y = Constant <value = float[1] {1.0}> () }"))
    assert ops(after) == {"Constant": 1}
    assert reasons(change) == {"y": "it is an output of the graph"}


def test_strings_stay() -> None:
    text = 'g (string[N] x) => (bool[N] y) { c = Constant <value_string = "a"> ()  y = Equal (x, c) }'
    model = model_of(graph(text, opset=19))
    change = LiftConstants().apply(model, Context())
    assert not change
    assert reasons(change) == {"c": "it holds strings or a sparse tensor"}


def test_sparse_constants_stay() -> None:
    proto = graph("g (float[3] x) => (float[3] y) { c = Constant <value = float[3] {0, 2, 0}> ()  y = Add (x, c) }")
    values = onnx.helper.make_tensor("", onnx.TensorProto.FLOAT, [1], [2.0])
    indices = onnx.helper.make_tensor("", onnx.TensorProto.INT64, [1], [1])
    sparse = onnx.helper.make_sparse_tensor(values, indices, [3])
    del proto.graph.node[0].attribute[:]
    proto.graph.node[0].attribute.append(onnx.helper.make_attribute("sparse_value", sparse))
    after, change = apply(LiftConstants(), proto)
    assert ops(after) == {"Constant": 1, "Add": 1}
    assert reasons(change) == {"c": "it holds strings or a sparse tensor"}


def test_a_constant_that_only_branches_read_is_stored_once() -> None:
    text = """
        g (bool c, float[3] x) => (float[3] y) {
            k = Constant <value = float[3] {1, 2, 3}> ()
            y = If (c) <
                then_branch = a () => (float[3] p) {
                    i = Constant <value_float = 2.0> ()  s = Add (x, k)  p = Mul (s, i) },
                else_branch = b () => (float[3] q) { q = Sub (x, k) }>
        }"""
    after, change = apply(LiftConstants(), graph(text))
    assert "Constant" not in ops(after)
    assert list(initializers(after)) == ["k"]
    branch = after.graph.node[0].attribute[0].g
    assert [t.name for t in branch.initializer] == ["i"]
    assert change.sites == ["k", "i"]


def test_the_body_of_a_function_keeps_its_constants() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[3] x) => (float[3] y) { y = local.Twice (x) }
        <domain: "local", opset_import: ["" : 17]>
        Twice (a) => (b) { two = Constant <value_float = 2.0> ()  b = Mul (a, two) }"""
    after, change = apply(LiftConstants(), graph(text))
    assert not change
    assert [n.op_type for n in after.functions[0].node] == ["Constant", "Mul"]


def test_doc_string_and_metadata_of_the_tensor_are_kept() -> None:
    proto = graph("g (float[1] x) => (float[1] y) { c = Constant <value = float[1] {1.0}> ()  y = Add (x, c) }")
    proto.graph.node[0].attribute[0].t.doc_string = "a one"
    after, _ = apply(LiftConstants(), proto)
    assert after.graph.initializer[0].doc_string == "a one"
