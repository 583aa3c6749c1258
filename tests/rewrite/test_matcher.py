"""The matcher looks at operators, attributes and constants by meaning, and says where it got stuck."""

from __future__ import annotations

import pytest
from rewrite_graphs import find, model

from onnxslim_llm.rewrite.rule import Rule, algebra


def rule(pattern: object, **more: object) -> Rule:
    return algebra("test", pattern, lambda op, x: x, **more)  # type: ignore[arg-type]


ADD_ONE = rule(lambda op, x: op.Add(x, 1.0))


@pytest.mark.parametrize("operands", ["x, one", "one, x"])
def test_commutative_operands_match_in_any_order(operands: str) -> None:
    found, _ = find(ADD_ONE, model(f"g (float[3] x) => (float[3] y) <float one = {{1.0}}> {{ y = Add ({operands}) }}"))
    assert found is not None
    assert found["x"].name == "x"


def test_other_operands_do_not() -> None:
    pattern = rule(lambda op, x: op.Sub(x, 1.0))
    found, search = find(pattern, model("g (float[3] x) => (float[3] y) <float one = {1.0}> { y = Sub (one, x) }"))
    assert found is None
    assert search.stuck is not None
    assert search.stuck.reason == "expected the constant 1.0"
    assert search.stuck.culprit == "x"


def test_backtracking_over_both_orders_of_nested_operands() -> None:
    pattern = rule(lambda op, x, y: op.Mul(op.Add(x, op.Neg(y)), op.Add(op.Abs(x), y)))
    text = """
        g (float[3] x, float[3] y) => (float[3] z) {
            n = Neg (y)  a = Abs (x)  p = Add (y, a)  q = Add (n, x)  z = Mul (p, q)
        }"""
    found, _ = find(pattern, model(text))
    assert found is not None
    assert (found["x"].name, found["y"].name) == ("x", "y")


@pytest.mark.parametrize("attributes", ["", "<axis = -1>", "<axis = 1>"])
def test_attributes_are_compared_with_defaults_and_negative_axes_resolved(attributes: str) -> None:
    pattern = rule(lambda op, x: op.Softmax(x, axis=-1))
    found, _ = find(pattern, model(f"g (float[2, 3] x) => (float[2, 3] y) {{ y = Softmax {attributes} (x) }}"))
    assert found is not None


def test_a_wrong_attribute_is_named() -> None:
    pattern = rule(lambda op, x: op.Softmax(x, axis=-1))
    found, search = find(pattern, model("g (float[2, 3] x) => (float[2, 3] y) { y = Softmax <axis = 0> (x) }"))
    assert found is None
    assert search.stuck is not None
    assert search.stuck.reason == "Softmax.axis is 0, expected -1"


def test_axes_of_unsqueeze_count_in_the_rank_of_the_result() -> None:
    pattern = rule(lambda op, x: op.Unsqueeze(x, axes=[2]))
    last = model("g (float[2, 3, 4] x) => (float[2, 3, 4, 1] y) <int64[1] a = {-1}> { y = Unsqueeze (x, a) }")
    assert find(pattern, last)[0] is None
    third = model("g (float[2, 3, 4] x) => (float[2, 3, 1, 4] y) <int64[1] a = {-2}> { y = Unsqueeze (x, a) }")
    assert find(pattern, third)[0] is not None


@pytest.mark.parametrize(
    ("opset", "text"),
    [
        (13, "y = ReduceMean <axes = [-1]> (x)"),
        (18, "a = Constant <value = int64[1] {1}> ()  y = ReduceMean (x, a)"),
    ],
)
def test_an_attribute_that_became_an_input_is_one_pattern(opset: int, text: str) -> None:
    pattern = rule(lambda op, x: op.ReduceMean(x, axes=[-1], keepdims=1))
    found, _ = find(pattern, model(f"g (float[2, 3] x) => (float[2, 1] y) {{ {text} }}", opset))
    assert found is not None


@pytest.mark.parametrize(
    "make",
    [
        "one = Constant <value = float {1.0}> ()",
        "one = Constant <value_float = 1.0> ()",
        "c = Constant <value = float {1.0}> ()  one = Identity (c)",
        "c = Constant <value = int64 {1}> ()  one = Cast <to = 1> (c)",
        "c = Constant <value_floats = [1.0]> ()  d = Identity (c)  one = Identity (d)",
    ],
)
def test_constants_are_seen_through_constant_identity_and_cast(make: str) -> None:
    found, _ = find(ADD_ONE, model(f"g (float[3] x) => (float[3] y) {{ {make}  y = Add (x, one) }}"))
    assert found is not None


def test_the_default_of_a_graph_input_is_no_constant() -> None:
    text = "g (float[3] x, float one = {1.0}) => (float[3] y) { y = Add (x, one) }"
    found, search = find(ADD_ONE, model(text))
    assert found is None
    assert search.stuck is not None
    assert search.stuck.reason == "expected the constant 1.0"


def test_a_constant_wildcard_refuses_what_is_computed() -> None:
    pattern = rule(lambda op, x: op.Mul(x, op.const("c")))
    assert find(pattern, model("g (float[3] x) => (float[3] y) { e = Exp (x)  y = Mul (x, e) }"))[0] is None


def test_the_same_wildcard_is_the_same_tensor() -> None:
    pattern = rule(lambda op, x: op.Mul(x, op.Sigmoid(x)))
    text = "g (float[3] x, float[3] z) => (float[3] y) {{ s = Sigmoid ({0})  y = Mul (s, x) }}"
    assert find(pattern, model(text.format("x")))[0] is not None
    found, search = find(pattern, model(text.format("z")))
    assert found is None
    assert search.stuck is not None
    assert search.stuck.reason.endswith("again")


def test_optional_nodes_and_alternatives() -> None:
    pattern = rule(lambda op, x: op.Relu(op.maybe("Neg", op.any_of("Exp", "Abs")(x))))
    for middle in ("m = Exp (x)", "a = Abs (x)  m = Neg (a)"):
        found, _ = find(pattern, model(f"g (float[3] x) => (float[3] y) {{ {middle}  y = Relu (m) }}"))
        assert found is not None
        assert found["x"].name == "x"


def test_missing_and_surplus_inputs() -> None:
    pattern = rule(lambda op, x: op.Clip(x, None, 1.0))
    text = "g (float[3] x) => (float[3] y) <float lo = {{0.0}}, float hi = {{1.0}}> {{ y = Clip (x, {0}, hi) }}"
    assert find(pattern, model(text.format("")))[0] is not None
    assert find(pattern, model(text.format("lo")))[0] is None
    found, search = find(rule(lambda op, x: op.Clip(x)), model(text.format("lo")))
    assert found is None
    assert search.stuck is not None
    assert search.stuck.reason == "Clip has 3 inputs, the pattern 1"
    assert find(rule(lambda op, x: op.Clip(x, _open_ended=True)), model(text.format("lo")))[0] is not None


def test_an_inner_tensor_that_is_used_elsewhere() -> None:
    text = "g (float[3] x) => (float[3] y, float[3] z) { e = Exp (x)  z = Neg (e)  y = Relu (e) }"
    closed = rule(lambda op, x: op.Relu(op.Exp(x)), keep_shared=False)
    found, search = find(closed, model(text))
    assert found is None
    assert search.stuck is not None
    assert (search.stuck.reason, search.stuck.culprit) == ("an inner tensor is used elsewhere too", "e")
    shared = rule(lambda op, x: op.Relu(op.Exp(x)), keep_shared=True)
    assert find(shared, model(text))[0] is not None


def test_an_inner_tensor_that_is_a_graph_output() -> None:
    text = "g (float[3] x) => (float[3] e, float[3] y) { e = Exp (x)  y = Relu (e) }"
    found, search = find(rule(lambda op, x: op.Relu(op.Exp(x)), keep_shared=False), model(text))
    assert found is None
    assert search.stuck is not None
    assert search.stuck.reason == "an inner tensor is also a graph output"


def test_an_inner_tensor_that_a_subgraph_reads() -> None:
    text = """
        g (float[3] x, bool c) => (float[3] y, float[3] z) {
            e = Exp (x)
            z = If (c) <
                then_branch = a () => (float[3] p) { p = Neg (e) },
                else_branch = b () => (float[3] q) { q = Abs (x) }>
            y = Relu (e)
        }"""
    assert find(rule(lambda op, x: op.Relu(op.Exp(x)), keep_shared=False), model(text))[0] is None


def test_another_domain_does_not_match() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 18, "local" : 1]>
        g (float[3] x) => (float[3] y) { y = local.Relu (x) }
        <domain: "local", opset_import: ["" : 18]>
        Relu (a) => (b) { b = Exp (a) }"""
    assert find(rule(lambda op, x: op.Relu(x)), model(text))[0] is None
    assert find(rule(lambda op, x: op.Relu(x, _domain="local")), model(text))[0] is not None


def test_bound_attributes_named_nodes_and_values() -> None:
    pattern = rule(lambda op, x: op.Add(op.Transpose(x, perm=op.bind("order"), _name="turn"), op.const("c")))
    text = """
        g (float[2, 3] x) => (float[3, 2] y) <float c = {0.5}> { t = Transpose <perm = [1, 0]> (x)  y = Add (t, c) }"""
    found, _ = find(pattern, model(text))
    assert found is not None
    assert found.attributes["order"] == [1, 0]
    assert found.node("turn").op == "Transpose"
    assert found.scalar("c") == 0.5
    assert found.root.op == "Add"


def test_several_outputs_of_one_subgraph() -> None:
    both = rule(lambda op, x: (op.Relu(op.Exp(x)), op.Exp(x)))
    with pytest.raises(TypeError):
        rule(lambda op, x: x).outputs  # noqa: B018 (reading it builds the pattern)
    text = "g (float[3] x) => (float[3] e, float[3] y) { e = Exp (x)  y = Relu (e) }"
    assert find(both, model(text))[0] is None  # the second Exp is another pattern node, which nothing binds
    shared = rule(_exp_and_relu)
    found, _ = find(shared, model(text))
    assert found is not None
    assert [t.name for t in found.outputs] == ["y", "e"]


def _exp_and_relu(op: object, x: object) -> object:
    e = op.Exp(x)  # type: ignore[attr-defined]
    return op.Relu(e), e  # type: ignore[attr-defined]
