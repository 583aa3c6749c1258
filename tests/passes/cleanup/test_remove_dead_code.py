from __future__ import annotations

import numpy as np
from cleanup_graphs import apply, graph, initializers, model_of, ops

from onnxslim_llm.passes.cleanup.remove_dead_code import RemoveDeadCode
from onnxslim_llm.rewrite.context import Context


def test_chains_of_dead_nodes_and_what_they_read() -> None:
    text = "g (float[N] x) => (float[N] y) { a = Exp (x)  b = Mul (a, w)  c = Log (b)  y = Neg (x) }"
    after, change = apply(RemoveDeadCode(), graph(text, w=np.ones(1, np.float32)))
    assert ops(after) == {"Neg": 1}
    assert not after.graph.initializer
    assert change.detail["nodes"] == 3


def test_unused_initializers() -> None:
    after, change = apply(RemoveDeadCode(), graph("g (float[N] x) => (float[N] y) { y = Neg (x) }", w=np.ones(4)))
    assert not after.graph.initializer
    assert change.sites == ["w"]


def test_the_default_of_an_input_stays_though_nothing_reads_it() -> None:
    text = "g (float[N] x, float w = {1.0}) => (float[N] y) { a = Mul (x, w)  y = Neg (x) }"
    after, _ = apply(RemoveDeadCode(), graph(text))
    assert ops(after) == {"Neg": 1}
    assert list(initializers(after)) == ["w"]
    assert [value.name for value in after.graph.input] == ["x", "w"]


def test_unused_inputs_of_the_model_stay() -> None:
    after, _ = apply(RemoveDeadCode(), graph("g (float[N] x, float[N] z) => (float[N] y) { a = Exp (z)  y = Neg (x) }"))
    assert [value.name for value in after.graph.input] == ["x", "z"]


def test_dead_nodes_inside_of_branches_and_outside_because_of_them() -> None:
    text = """
        g (bool c, float[N] x) => (float[N] y) {
            only_dead = Exp (x)
            y = If (c) <
                then_branch = a () => (float[N] p) { d = Abs (only_dead)  p = Neg (x) },
                else_branch = b () => (float[N] q) { q = Sin (x) }>
        }"""
    after, _ = apply(RemoveDeadCode(), graph(text))
    assert ops(after) == {"If": 1, "Neg": 1, "Sin": 1}


def test_what_a_live_branch_reads_stays() -> None:
    text = """
        g (bool c, float[N] x) => (float[N] y) {
            used = Exp (x)
            y = If (c) <
                then_branch = a () => (float[N] p) { p = Abs (used) },
                else_branch = b () => (float[N] q) { q = Sin (x) }>
        }"""
    _, change = apply(RemoveDeadCode(), graph(text))
    assert not change


def test_functions_that_nothing_calls_through_others_either() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[N] x) => (float[N] y) { y = local.Outer (x) }
        <domain: "local", opset_import: ["" : 17, "local" : 1]>
        Outer (a) => (b) { b = local.Inner (a) }
        <domain: "local", opset_import: ["" : 17]>
        Inner (a) => (b) { b = Exp (a) }
        <domain: "local", opset_import: ["" : 17]>
        Alone (a) => (b) { b = Log (a) }"""
    after, change = apply(RemoveDeadCode(), graph(text))
    assert [f.name for f in after.functions] == ["Outer", "Inner"]
    assert change.sites == ["local::Alone"]


def test_optional_outputs_that_nobody_reads() -> None:
    text = """
        g (float[N, 4] x) => (float[N, 4] y, float[N, 1] s) {
            y, mean, s = LayerNormalization (x, w)
        }"""
    after, change = apply(RemoveDeadCode(), graph(text, w=np.ones(4, np.float32)))
    assert list(after.graph.node[0].output) == ["y", "", "s"]
    assert change.detail["optional_outputs"] == 1


def test_required_outputs_stay() -> None:
    text = "g (float[4] x) => (float[2] y) { y, z = Split (x) }"
    after, change = apply(RemoveDeadCode(), graph(text))
    assert list(after.graph.node[0].output) == ["y", "z"]
    assert not change


def test_nodes_are_put_in_order() -> None:
    proto = graph("g (float[N] x) => (float[N] y) { a = Exp (x)  b = Neg (a)  y = Abs (b) }")
    shuffled = [proto.graph.node[i] for i in (2, 0, 1)]
    nodes = [type(n).FromString(n.SerializeToString()) for n in shuffled]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    model = model_of(proto)
    assert RemoveDeadCode().apply(model, Context())
    assert [n.op_type for n in model.to_proto().graph.node] == ["Exp", "Neg", "Abs"]
