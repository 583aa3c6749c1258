from __future__ import annotations

import numpy as np
import onnx
import pytest
from cleanup_graphs import apply, assert_same_results, feeds, graph, model_of, ops, reasons

from onnxslim_llm.errors import ModelError
from onnxslim_llm.passes.cleanup.inline_functions import InlineFunctions
from onnxslim_llm.rewrite.context import Context

HEADER = '<ir_version: 8, opset_import: ["" : 17, "local" : 1]>\n'


def inlined(text: str, **options: object) -> tuple[onnx.ModelProto, object]:
    proto = graph(HEADER + text)
    return apply(InlineFunctions(**options), proto)  # type: ignore[arg-type]


def test_functions_in_functions_and_names_that_stay_apart() -> None:
    text = """
        g (float[N] x) => (float[N] y) { a = local.Outer (x)  t = Neg (a)  y = local.Outer (t) }
        <domain: "local", opset_import: ["" : 17, "local" : 1]>
        Outer (p) => (q) { t = Exp (p)  u = local.Inner (t)  q = Abs (u) }
        <domain: "local", opset_import: ["" : 17]>
        Inner (p) => (q) { t = Sin (p)  q = Cos (t) }"""
    after, _change = inlined(text)
    assert ops(after) == {"Exp": 2, "Sin": 2, "Cos": 2, "Abs": 2, "Neg": 1}
    names = [name for node in after.graph.node for name in node.output]
    assert len(names) == len(set(names))


def test_attributes_of_the_call_defaults_and_those_that_are_missing() -> None:
    text = """
        g (float[N, 4] x) => (float[N, 4] y, float[N, 4] z) {
            y = local.F <slope = 0.5, axis = 0> (x)
            z = local.F <axis = 1> (x)
        }
        <domain: "local", opset_import: ["" : 17]>
        F <axis, slope: float = 0.25> (p) => (q) {
            s = Softmax <axis: int = @axis> (p)
            q = LeakyRelu <alpha: float = @slope> (s)
        }"""
    after, _ = inlined(text)
    alphas = [a.f for n in after.graph.node if n.op_type == "LeakyRelu" for a in n.attribute]
    axes = [a.i for n in after.graph.node if n.op_type == "Softmax" for a in n.attribute]
    assert (alphas, axes) == ([0.5, 0.25], [0, 1])


def test_an_attribute_without_value_or_default_goes() -> None:
    text = """
        g (float[N, 4] x) => (float[N, 4] y) { y = local.F (x) }
        <domain: "local", opset_import: ["" : 17]>
        F <axis> (p) => (q) { q = Softmax <axis: int = @axis> (p) }"""
    model = model_of(graph(HEADER + text))
    InlineFunctions().apply(model, Context())
    assert not model.to_proto().graph.node[0].attribute


def test_inputs_that_are_left_out() -> None:
    text = """
        g (float[N] x, float h) => (float[N] y) { y = local.Limit (x, , h) }
        <domain: "local", opset_import: ["" : 17]>
        Limit (p, lo, hi) => (q) { q = Clip (p, lo, hi) }"""
    after, _ = inlined(text)
    assert list(after.graph.node[0].input) == ["x", "", "h"]


def test_an_input_that_is_handed_on_and_one_result_under_two_names() -> None:
    text = """
        g (float[N] x) => (float[N] y, float[N] z, float[N] w) { y, z, w = local.F (x) }
        <domain: "local", opset_import: ["" : 17]>
        F (p) => (p, q, q) { q = Exp (p) }"""
    proto = graph(
        HEADER + text.replace("(p, q, q)", "(p, q, r)").replace("q = Exp (p)", "q = Exp (p)  r = Identity (q)")
    )
    proto.functions[0].output[2] = "q"
    del proto.functions[0].node[1]
    model = model_of(proto)
    assert InlineFunctions().apply(model, Context())
    after = model.to_proto()
    del after.functions[:]  # the runtime does not like this one
    assert ops(after) == {"Exp": 1, "Identity": 2}
    expected = feeds(proto)["x"]
    from cleanup_graphs import run

    results = run(after, {"x": expected})
    np.testing.assert_array_equal(results["y"], expected)
    np.testing.assert_array_equal(results["z"], results["w"])


def test_subgraphs_in_functions_and_calls_in_subgraphs() -> None:
    text = """
        g (bool c, float[N] x) => (float[N] y) {
            y = If (c) <
                then_branch = t () => (float[N] p) { p = local.F (c, x) },
                else_branch = e () => (float[N] q) { q = Neg (x) }>
        }
        <domain: "local", opset_import: ["" : 17]>
        F (d, v) => (w) {
            k = Exp (v)
            w = If (d) <
                then_branch = t () => (float[N] p) { p = Sin (k) },
                else_branch = e () => (float[N] q) { q = Cos (k) }>
        }"""
    after, _ = inlined(text)
    assert ops(after) == {"If": 2, "Exp": 1, "Sin": 1, "Cos": 1, "Neg": 1}


def test_only_some() -> None:
    text = """
        g (float[N] x) => (float[N] y) { a = local.F (x)  y = local.G (a) }
        <domain: "local", opset_import: ["" : 17]>
        F (p) => (q) { q = Exp (p) }
        <domain: "local", opset_import: ["" : 17]>
        G (p) => (q) { q = Neg (p) }"""
    after, change = inlined(text, only=("local::F",))
    assert ops(after) == {"Exp": 1, "G": 1}
    assert change.sites == ["a"]  # type: ignore[attr-defined]


def test_a_body_for_another_opset() -> None:
    text = """
        g (float[N, 4] x) => (float[N, 1] y) { y = local.F (x) }
        <domain: "local", opset_import: ["" : 12]>
        F (p) => (q) { q = ReduceSum <axes = [1]> (p) }"""
    model = model_of(graph(HEADER.replace("17", "12") + text))
    model.set_opset("", 17)
    change = InlineFunctions().apply(model, Context())
    assert reasons(change) == {"y": "its body is written for opset 12, the model has 17: ReduceSum changed in between"}


def test_a_body_for_another_opset_that_means_the_same() -> None:
    text = """
        g (float[N, 4] x) => (float[N, 4] y) { y = local.F (x) }
        <domain: "local", opset_import: ["" : 14]>
        F (p) => (q) { q = Exp (p) }"""
    proto = graph(HEADER + text.replace('"" : 14', '"" : 17'))
    proto.functions[0].opset_import[0].version = 14
    model = model_of(proto)
    assert InlineFunctions().apply(model, Context())
    assert_same_results(graph(HEADER + text.replace('"" : 14', '"" : 17')), model.to_proto(), feeds(proto))


def test_a_function_that_calls_itself_is_an_error() -> None:
    text = """
        g (float[N] x) => (float[N] y) { y = local.F (x) }
        <domain: "local", opset_import: ["" : 17]>
        F (p) => (q) { q = Exp (p) }"""
    proto = graph(HEADER + text)
    proto.functions[0].node[0].op_type, proto.functions[0].node[0].domain = "F", "local"
    with pytest.raises(ModelError, match="calls itself") as caught:
        InlineFunctions().apply(model_of(proto), Context())
    assert "local::F" in caught.value.where


def test_metadata_of_the_body_is_kept() -> None:
    text = """
        g (float[N] x) => (float[N] y) { y = local.F (x) }
        <domain: "local", opset_import: ["" : 17]>
        F (p) => (q) { t = Exp (p)  q = Neg (t) }"""
    proto = graph(HEADER + text)
    proto.functions[0].node[0].metadata_props.add(key="origin", value="body")
    after, _ = apply(InlineFunctions(), proto)
    assert [p.value for p in after.graph.node[0].metadata_props] == ["body"]
