from __future__ import annotations

import numpy as np
import pytest
from cleanup_graphs import apply, graph, initializers, ops

from onnxslim_llm.passes.cleanup.cleanup import Cleanup
from onnxslim_llm.passes.cleanup.inline_branches import InlineBranches

YES, NO = np.array(True), np.array(False)
TEXT = """
    g (float[N] x) => (float[N] y) {
        z = If (c) <
            then_branch = t () => (float[N] p) <float k = {2.0}> { e = Exp (x)  p = Mul (e, k) },
            else_branch = e () => (float[N] q) { e = Log (x)  q = Neg (e) }>
        y = Abs (z)
    }"""


@pytest.mark.parametrize(("condition", "left"), [(YES, {"Exp", "Mul", "Abs"}), (NO, {"Log", "Neg", "Abs"})])
def test_the_branch_that_is_taken(condition: np.ndarray, left: set[str]) -> None:
    after, change = apply(InlineBranches(), graph(TEXT, c=condition))
    assert set(ops(after)) == left
    assert change.sites == ["z"]
    assert set(initializers(after)) == ({"k"} if condition else set())


def test_a_computed_condition_stays() -> None:
    text = TEXT.replace("float[N] x)", "float[N] x, bool c)")
    _, change = apply(InlineBranches(), graph(text))
    assert not change
    _, change = apply(InlineBranches(), graph(text.replace("bool c)", "bool c = {1})")))
    assert not change


def test_branches_in_branches_with_the_same_names_inside() -> None:
    inner = """
        {0} = If (c) <
            then_branch = t{0} () => (float[N] p{0}) {{ e = Exp ({1})  p{0} = Neg (e) }},
            else_branch = f{0} () => (float[N] q{0}) {{ q{0} = Sin ({1}) }}>"""
    text = "g (float[N] x) => (float[N] y) {" + inner.format("a", "x") + inner.format("b", "a") + " y = Add (a, b) }"
    after, change = apply(InlineBranches(), graph(text, c=YES))
    assert ops(after) == {"Exp": 2, "Neg": 2, "Add": 1}
    assert change.sites == ["a", "b"]


def test_a_branch_that_hands_on_something_from_outside_or_a_constant() -> None:
    text = """
        g (float[N] x) => (float[N] y, float[N] z, float[1] w) {
            y, z, w = If (c) <
                then_branch = t () => (float[N] p, float[N] p2, float[1] k) <float[1] k = {2.0}> {
                    p = Exp (x)  p2 = Identity (p) },
                else_branch = e () => (float[N] q, float[N] r, float[1] s) {
                    q = Log (x)  r = Sin (x)  s = ReduceSum (x) }>
        }"""
    after, _ = apply(InlineBranches(), graph(text, c=YES))
    assert ops(after) == {"Exp": 1, "Identity": 2}


def test_a_condition_about_shapes() -> None:
    text = """
        g (float[N, 1] x) => (float[M] y) {
            s = Shape (x)  d = Gather (s, one)  c = Equal (d, one)
            z = If (c) <
                then_branch = t () => (float[P] p) { p = Squeeze (x, axis) },
                else_branch = e () => (float[Q, R] q) { q = Identity (x) }>
            y = Abs (z)
        }"""
    proto = graph(text.replace("float[Q, R] q) { q = Identity (x) }", "float[Q] q) { q = Reshape (x, all) }"),
                  one=np.array(1), axis=np.array([1]), all=np.array([-1]))  # fmt: skip
    after, _ = apply(Cleanup(), proto, {"N": 3, "M": 3})
    assert ops(after) == {"Squeeze": 1, "Abs": 1}
