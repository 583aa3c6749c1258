from __future__ import annotations

import numpy as np
import pytest
from cleanup_graphs import apply, graph, model_of, ops, reasons

from onnxslim_llm.passes.cleanup.eliminate_common_subexpressions import EliminateCommonSubexpressions
from onnxslim_llm.rewrite.context import Context

CSE = EliminateCommonSubexpressions


def test_chains_of_equal_nodes() -> None:
    text = "g (float[N] x) => (float[N] y) { a = Exp (x)  b = Neg (a)  c = Exp (x)  d = Neg (c)  y = Mul (b, d) }"
    after, change = apply(CSE(), graph(text))
    assert ops(after) == {"Exp": 1, "Neg": 1, "Mul": 1}
    assert change.sites == ["c", "d"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a = Softmax (x)", "b = Softmax <axis = -1> (x)"),
        ("a = Add (x, k)", "b = Add (k, x)"),
        ("a = Clip (x, k)", "b = Clip (x, k, )"),
        ("a = ReduceSum <keepdims = 1> (x)", "b = ReduceSum (x)"),
    ],
)
def test_equal_by_meaning(first: str, second: str) -> None:
    text = f"g (float[N, 4] x) => (float[N, 4] y) {{ {first}  {second}  s = Mul (a, b)  y = Add (x, s) }}"
    _, change = apply(CSE(), graph(text, k=np.array(0.5, np.float32)))
    assert change.sites == ["b"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a = Softmax (x)", "b = Softmax <axis = 0> (x)"),
        ("a = Sub (x, k)", "b = Sub (k, x)"),
        ("a = Clip (x, k)", "b = Clip (x, , k)"),
        ("a = Cast <to = 1> (x)", "b = CastLike (x, x)"),
        ("a = RandomNormalLike (x)", "b = RandomNormalLike (x)"),
    ],
)
def test_different(first: str, second: str) -> None:
    text = f"g (float[N, 4] x) => (float[N, 4] y) {{ {first}  {second}  s = Mul (a, b)  y = Add (x, s) }}"
    change = CSE().apply(model_of(graph(text, k=np.array(0.5, np.float32))), Context())
    assert not change


def test_constants_in_attributes_are_compared_by_content() -> None:
    text = """
        g (int64[1] n) => (float[M] y) {
            a = ConstantOfShape <value = float[1] {1}> (n)  b = ConstantOfShape <value = float[1] {1}> (n)
            c = ConstantOfShape <value = float[1] {2}> (n)
            d = Add (a, b)  y = Mul (c, d)
        }"""
    _, change = apply(CSE(), graph(text))
    assert change.sites == ["b"]


def test_nodes_with_several_outputs() -> None:
    text = """
        g (float[4] x) => (float[2] y) {
            a, b = Split (x)  c, d = Split (x)  e = Sub (a, d)  f = Sub (b, c)  y = Mul (e, f)
        }"""
    after, change = apply(CSE(), graph(text))
    assert ops(after)["Split"] == 1
    assert change.sites == ["c", "d"]


def test_an_output_of_the_graph_takes_over_the_first_node() -> None:
    text = "g (float[N] x) => (float[N] y, float[N] z) { a = Exp (x)  y = Exp (x)  z = Neg (a) }"
    after, _ = apply(CSE(), graph(text))
    assert [(n.op_type, n.input[0], n.output[0]) for n in after.graph.node] == [("Exp", "x", "y"), ("Neg", "y", "z")]


def test_two_outputs_of_the_graph_are_left() -> None:
    after, change = apply(CSE(), graph("g (float[N] x) => (float[N] y, float[N] z) { y = Exp (x)  z = Exp (x) }"))
    assert ops(after) == {"Exp": 2}
    assert reasons(change) == {"z": "it equals 'y', but is an output of a graph"}


def test_a_branch_uses_what_is_around_it_but_not_the_other_branch() -> None:
    text = """
        g (bool c, float[N] x) => (float[N] y) {
            a = Exp (x)
            z = If (c) <
                then_branch = t () => (float[N] p) { b = Exp (x)  q = Abs (x)  p = Mul (b, q) },
                else_branch = e () => (float[N] r) { s = Abs (x)  r = Neg (s) }>
            y = Add (a, z)
        }"""
    after, change = apply(CSE(), graph(text))
    assert change.sites == ["b"]
    assert ops(after)["Abs"] == 2


def test_the_output_of_a_branch_is_left() -> None:
    text = """
        g (bool c, float[N] x) => (float[N] y) {
            a = Exp (x)
            z = If (c) <
                then_branch = t () => (float[N] p) { p = Exp (x) },
                else_branch = e () => (float[N] r) { r = Neg (x) }>
            y = Add (a, z)
        }"""
    _, change = apply(CSE(), graph(text))
    assert reasons(change) == {"p": "it equals 'a', but is an output of a graph"}


def test_what_comes_later_around_a_branch_is_not_used_in_it() -> None:
    text = """
        g (bool c, float[N] x) => (float[N] y) {
            z = If (c) <
                then_branch = t () => (float[N] p) { b = Exp (x)  p = Neg (b) },
                else_branch = e () => (float[N] r) { r = Neg (x) }>
            a = Exp (x)
            y = Add (a, z)
        }"""
    _, change = apply(CSE(), graph(text))
    assert not change


def test_a_dequantized_weight_keeps_a_node_for_each_user() -> None:
    text = """
        g (float[N, 2] x) => (float[N, 2] y) {
            a = DequantizeLinear (q, s)  b = DequantizeLinear (q, s)
            m = MatMul (x, a)  n = MatMul (x, b)  y = Add (m, n)
        }"""
    _, change = apply(CSE(), graph(text, q=np.array([[1, 2], [3, 4]], np.int8), s=np.array(0.5, np.float32)))
    assert not change


def test_foreign_operators_may_have_state() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 17, "foreign" : 1]>
        g (float[N] x) => (float[N] y) { a = foreign.F (x)  b = foreign.F (x)  y = Add (a, b) }"""
    assert not CSE().apply(model_of(graph(text)), Context())
