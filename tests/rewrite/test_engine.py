"""Rules are applied up to the fixpoint, and the graph around them stays whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from rewrite_graphs import model, ops, rewrite

from onnxslim_llm.errors import CompilerBug
from onnxslim_llm.ir.proto.skeleton import NodeSkeleton, skeleton_of
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.engine import apply_rules
from onnxslim_llm.rewrite.matcher import Match
from onnxslim_llm.rewrite.pattern import PatternBuilder
from onnxslim_llm.rewrite.rule import Refusal, Rule, algebra

X = np.array([0.5, -1.0, 2.0], np.float32)

NEG_NEG = algebra("--x -> x", lambda op, x: op.Neg(op.Neg(x)), lambda op, x: x)
IDENTITY = algebra("identity(x) -> x", lambda op, x: op.Identity(x), lambda op, x: x)
SQUARE = algebra("x * x -> x ** 2", lambda op, x: op.Mul(x, x), lambda op, x: op.Pow(x, 2.0), keep_shared=False)


def test_a_chain_collapses_to_nothing() -> None:
    text = "g (float[3] x) => (float[3] y) { a = Neg (x)  b = Neg (a)  c = Neg (b)  d = Neg (c)  y = Exp (d) }"
    graph = model(text)
    change = rewrite(graph, [NEG_NEG], {"x": X})
    assert ops(graph) == ["Exp"]
    assert change.detail["rules"] == {"--x -> x": 2}
    assert len(change.sites) == 2


def test_a_graph_output_keeps_its_name_when_a_new_node_makes_it() -> None:
    graph = model("g (float[3] x) => (float[3] y) { y = Mul (x, x) }")
    rewrite(graph, [SQUARE], {"x": X})
    assert ops(graph) == ["Pow"]
    assert graph.graph.outputs[0].name == "y"


def test_a_graph_output_takes_over_an_existing_node() -> None:
    graph = model("g (float[3] x) => (float[3] y) { e = Exp (x)  a = Neg (e)  y = Neg (a) }")
    rewrite(graph, [NEG_NEG], {"x": X})
    assert ops(graph) == ["Exp"]


def test_a_graph_output_that_is_a_graph_input_gets_an_identity() -> None:
    graph = model("g (float[3] x) => (float[3] y) { a = Neg (x)  y = Neg (a) }")
    rewrite(graph, [NEG_NEG, IDENTITY], {"x": X})
    assert ops(graph) == ["Identity"]


def test_two_graph_outputs_of_one_value_keep_both_names() -> None:
    text = "g (float[3] x) => (float[3] e, float[3] y) { e = Exp (x)  a = Neg (e)  y = Neg (a) }"
    graph = model(text)
    rewrite(graph, [NEG_NEG, IDENTITY], {"x": X})
    assert ops(graph) == ["Exp", "Identity"]


def test_nodes_of_subgraphs_are_rewritten_and_outer_tensors_seen() -> None:
    text = """
        g (float[3] x, bool c) => (float[3] z) {
            n = Neg (x)
            z = If (c) <
                then_branch = a () => (float[3] p) { m = Neg (n)  p = Exp (m) },
                else_branch = b () => (float[3] q) { r = Mul (x, x)  q = Abs (r) }>
        }"""
    graph = model(text)
    rewrite(graph, [NEG_NEG, SQUARE], {"x": X, "c": np.array(True)})
    assert sorted(ops(graph)) == ["Abs", "Exp", "If", "Pow"]


def test_a_subgraph_output_never_becomes_an_outer_tensor() -> None:
    text = """
        g (float[3] x, bool c) => (float[3] z) {
            e = Exp (x)
            z = If (c) <
                then_branch = a () => (float[3] p) { n = Neg (e)  p = Neg (n) },
                else_branch = b () => (float[3] q) { q = Abs (e) }>
        }"""
    graph = model(text)
    rewrite(graph, [NEG_NEG, IDENTITY], {"x": X, "c": np.array(True)})
    assert sorted(ops(graph)) == ["Abs", "Exp", "Identity", "If"]


class Swish(Rule):
    """x * sigmoid(x), explained where it does not fit."""

    explain = True

    def pattern(self, op: PatternBuilder, x: Any) -> Any:  # type: ignore[override]
        return op.Mul(x, op.Sigmoid(x))

    def check(self, match: Match) -> Refusal | None:
        if match["x"].name == "secret":
            return Refusal("the input is secret", "secret")
        return None

    def rewrite(self, op: Builder, match: Match) -> Any:
        return op.Mul(op.Sigmoid(match["x"]), match["x"])


def test_a_refusal_is_reported_with_its_culprit() -> None:
    graph = model("g (float[3] secret) => (float[3] y) { s = Sigmoid (secret)  y = Mul (secret, s) }")
    change = apply_rules(graph, [Swish()])
    assert not change
    assert [(s.where, s.reason) for s in change.skipped] == [("y", "Swish: the input is secret at 'secret'")]


def test_a_near_miss_is_reported_and_a_far_one_is_not() -> None:
    graph = model("g (float[3] x, float[3] z) => (float[3] y) { s = Sigmoid (z)  y = Mul (x, s) }")
    change = apply_rules(graph, [Swish()])
    assert [s.reason for s in change.skipped] == ["Swish: expected 'x' (x) again at 'z'"]
    graph = model("g (float[3] x, float[3] z) => (float[3] y) { y = Mul (x, z) }")
    assert not apply_rules(graph, [Swish()]).skipped


def test_rules_without_end_are_a_bug() -> None:
    swap = algebra("swap", lambda op, x, y: op.Sub(x, y), lambda op, x, y: op.Sub(x, y))
    graph = model("g (float[3] x, float[3] z) => (float[3] y) { y = Sub (x, z) }")
    with pytest.raises(CompilerBug, match="do not come to an end") as caught:
        apply_rules(graph, [swap])
    assert caught.value.where == "swap"


def test_a_rewrite_with_the_wrong_number_of_outputs_is_a_bug() -> None:
    wrong = algebra("wrong", lambda op, x: op.Neg(x), lambda op, x: (x, x))
    with pytest.raises(CompilerBug, match="2 tensors for 1 outputs"):
        apply_rules(model("g (float[3] x) => (float[3] y) { y = Neg (x) }"), [wrong])


class MinAndMax(Rule):
    """Both outputs of one subgraph are replaced, the inner one by a node that comes later in the list."""

    keep_shared = True

    def pattern(self, op: PatternBuilder, x: Any) -> Any:  # type: ignore[override]
        inner = op.Neg(x)
        return op.Exp(inner), inner

    def rewrite(self, op: Builder, match: Match) -> Any:
        inner = op.Sub(0.0, match["x"])
        return op.Pow(2.7182818, inner), inner


def test_fusion_with_several_outputs_keeps_the_order_of_the_nodes_valid() -> None:
    text = "g (float[3] x) => (float[3] y, float[3] z) { n = Neg (x)  z = Abs (n)  y = Exp (n) }"
    graph = model(text)
    rewrite(graph, [MinAndMax()], {"x": X})
    assert sorted(ops(graph)) == ["Abs", "Pow", "Sub"]


def test_one_new_tensor_for_two_outputs() -> None:
    class Same(MinAndMax):
        def rewrite(self, op: Builder, match: Match) -> Any:
            both = op.Sub(0.0, match["x"])
            return both, both

    text = "g (float[3] x) => (float[3] y, float[3] z) { n = Neg (x)  e = Exp (n)  z = Abs (n)  y = Abs (e) }"
    graph = model(text)
    apply_rules(graph, [Same()])
    assert sorted(ops(graph)) == ["Abs", "Abs", "Sub"]
    for node in graph.graph.nodes:
        for tensor in node.inputs:
            assert isinstance(tensor, gs.Constant) or tensor.inputs or tensor in graph.graph.inputs


def test_the_new_node_inherits_metadata_of_the_root() -> None:
    proto = model("g (float[3] x) => (float[3] y) { y = Mul (x, x) }").to_proto()
    proto.graph.node[0].metadata_props.add(key="origin", value="layer 1")
    proto.graph.node[0].doc_string = "square"
    from onnxslim_llm.ir.model import from_proto

    graph = from_proto(proto)
    apply_rules(graph, [SQUARE])
    node = graph.to_proto().graph.node[0]
    assert (node.op_type, node.doc_string) == ("Pow", "square")
    assert [(p.key, p.value) for p in node.metadata_props] == [("origin", "layer 1")]
    assert skeleton_of(graph.graph.nodes[0], NodeSkeleton) is not None


def test_names_are_new_and_the_same_in_every_run() -> None:
    text = "g (float[3] x) => (float[3] y) { m = Mul (x, x)  y = Mul (m, m) }"
    names = []
    for _ in range(2):
        graph = model(text)
        apply_rules(graph, [SQUARE])
        names.append([t.name for node in graph.graph.nodes for t in (*node.inputs, *node.outputs)])
    assert names[0] == names[1]
    assert len(set(names[0])) == len({*names[0]})


def test_many_unnamed_equal_users_of_one_constant() -> None:
    users = "  ".join(f"a{i} = Identity (x)  b{i} = Add (a{i}, one)" for i in range(40))
    total = ", ".join(f"b{i}" for i in range(40))
    text = f"g (float[3] x) => (float[3] y) <float one = {{1.0}}> {{ {users}  y = Sum ({total}) }}"
    graph = model(text)
    rewrite(graph, [IDENTITY], {"x": X})
    assert ops(graph) == ["Add"] * 40 + ["Sum"]
    assert len(graph.graph.inputs[0].outputs) == 40
