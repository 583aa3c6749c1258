"""Computing a tensor apart from its model: what it depends on, what it is, and when that is refused."""

from __future__ import annotations

import numpy as np
import pytest
from rewrite_graphs import model

from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.rewrite.probe import Probe, Unprobed, make_probe, size_at

POSITIONS = """
    agraph (int64[B, S] ids, float[B, 2, P, 4] past, float[V, 8] table) => (float[B, S, 8] hidden, int64[T] positions)
    <int64 one = {1}, int64 zero = {0}, int64 two = {2}>
    {
        hidden = Gather (table, ids)
        past_shape = Shape (past)
        p = Gather (past_shape, two)
        s_1d = Shape <start = 1, end = 2> (hidden)
        s = Squeeze (s_1d)
        total = Add (p, s)
        positions = Range (p, total, one)
    }
"""


def probe_of(text: str, name: str, **options: object) -> Probe | Unprobed:
    made = model(text)
    values = infer_shapes(made)
    tensor = next(t for n in made.graph.nodes for t in n.outputs if t.name == name)
    return make_probe(made, values, tensor, **options)  # type: ignore[arg-type]


def test_sizes_of_hidden_states_need_no_data() -> None:
    probe = probe_of(POSITIONS, "positions")
    assert isinstance(probe, Probe)
    assert probe.inputs == []
    assert probe.symbols == {"B", "P", "S"}
    np.testing.assert_array_equal(probe({"B": 2, "P": 3, "S": 2}, {}), [3, 4])


def test_a_size_that_is_missing_gives_nothing() -> None:
    probe = probe_of(POSITIONS, "positions")
    assert isinstance(probe, Probe)
    assert probe({"B": 2, "P": 3}, {}) is None


def test_inputs_whose_content_matters_are_named() -> None:
    probe = probe_of(
        """
        agraph (int64[B, T] mask, float[B, T] other) => (float[B, T] y)
        <float low = {-9.0}, float zero = {0.0}>
        {
            seen = Cast <to = 9> (mask)
            like = Shape (other)
            zeros = Expand (zero, like)
            y = Where (seen, zeros, low)
        }
        """,
        "y",
    )
    assert isinstance(probe, Probe)
    assert [t.name for t in probe.inputs] == ["mask"]
    value = probe({"B": 1, "T": 3}, {"mask": np.array([[0, 1, 2]])})
    np.testing.assert_array_equal(value, np.array([[-9, 0, 0]], np.float32))


def test_constants_can_be_replaced() -> None:
    probe = probe_of("agraph (int64[N] x) => (int64[N] y) <int64 c = {4096}> { y = Sub (x, c) }", "y")
    assert isinstance(probe, Probe)
    (constant,) = probe.constants
    value = probe({"N": 1}, {"x": np.array([5])}, {id(constant): np.array(6)})
    np.testing.assert_array_equal(value, [-1])


def test_what_does_not_fit_gives_nothing() -> None:
    probe = probe_of("agraph (int64[N] x, int64[M] z) => (int64[K] y) { y = Add (x, z) }", "y")
    assert isinstance(probe, Probe)
    assert probe({"N": 2, "M": 3}, {"x": np.zeros(2, np.int64), "z": np.zeros(3, np.int64)}) is None


@pytest.mark.parametrize(
    ("text", "reason", "culprit"),
    [
        ("agraph (float[N] x) => (float[N] y) { r = RandomNormalLike (x) y = Add (r, x) }", "RandomNormalLike", "r"),
        ("agraph (float[N, N] x) => (float[N, N] y) { r = Det (x) y = Add (r, x) }", "Det", "r"),
        (
            """agraph (bool c, float[N] x) => (float[N] y) {
                b = If (c) <then_branch = g1 () => (float[N] t) { t = Neg (x) },
                            else_branch = g2 () => (float[N] e) { e = Identity (x) }>
                y = Neg (b)
            }""",
            "If",
            "b",
        ),
    ],
)
def test_operators_that_are_not_allowed_are_named(text: str, reason: str, culprit: str) -> None:
    refused = probe_of(text, "y")
    assert isinstance(refused, Unprobed)
    assert reason in refused.reason
    assert refused.culprit == culprit


def test_a_caller_can_refuse_nodes() -> None:
    text = "agraph (int64[N] x) => (int64[N] y) { a = Mul (x, x) y = Neg (a) }"
    refused = probe_of(text, "y", check=lambda node: "no products" if node.op == "Mul" else "")
    assert refused == Unprobed("no products", "a")


def test_too_many_nodes_are_refused() -> None:
    steps = "\n".join(f"t{i + 1} = Neg (t{i})" for i in range(300))
    refused = probe_of(f"agraph (int64[N] t0) => (int64[N] y) {{ {steps} y = Neg (t300) }}", "y")
    assert isinstance(refused, Unprobed)
    assert "more than 256 nodes" in refused.reason


def test_size_at() -> None:
    from onnxslim_llm.ir.shapes.dims import parse

    assert size_at(parse("2*P + S + 1"), {"P": 3, "S": 4}) == 11
    assert size_at(7, {}) == 7
    assert size_at(parse("P"), {}) is None
