from __future__ import annotations

import numpy as np
import pytest
from cleanup_graphs import apply, graph, initializers, ops

from onnxslim_llm.passes.cleanup.tie_weights import TieWeights

TABLE = np.random.default_rng(0).standard_normal((96, 32)).astype(np.float32)
TEXT = """
    g (int64[N] ids, float[N, 32] h) => (float[N, 32] e, float[N, 96] y) {
        e = Gather (table, ids)
        y = MatMul (h, head)
    }"""
GEMM = TEXT.replace("MatMul (h, head)", "Gemm (h, head)")


def test_a_matmul_reads_the_table_through_a_transpose() -> None:
    after, change = apply(TieWeights(), graph(TEXT, table=TABLE, head=TABLE.T.copy()))
    assert ops(after) == {"Gather": 1, "Transpose": 1, "MatMul": 1}
    assert list(initializers(after)) == ["table"]
    assert change.detail == {"bytes": TABLE.nbytes}


def test_a_gemm_is_told_to_transpose() -> None:
    after, _ = apply(TieWeights(), graph(GEMM, table=TABLE, head=TABLE.T.copy()))
    assert ops(after) == {"Gather": 1, "Gemm": 1}
    assert list(initializers(after)) == ["table"]


def test_the_table_stays_whichever_comes_first() -> None:
    proto = graph(TEXT, head=TABLE.T.copy(), table=TABLE)
    _after, change = apply(TieWeights(), proto)
    assert change.sites == ["head"]


def test_users_inside_of_branches() -> None:
    text = """
        g (bool c, int64[N] ids, float[N, 32] h) => (float[N, 32] e, float[N, 96] y) {
            e = Gather (table, ids)
            y = If (c) <
                then_branch = t () => (float[N, 96] p) { p = MatMul (h, head) },
                else_branch = f () => (float[N, 96] q) { n = Neg (h)  q = MatMul (n, head) }>
        }"""
    after, _ = apply(TieWeights(), graph(text, table=TABLE, head=TABLE.T.copy()))
    assert ops(after)["Transpose"] == 1
    assert [n.op_type for n in after.graph.node] == ["Gather", "Transpose", "If"]


@pytest.mark.parametrize("place", [(0, 0), (47, 13), (95, 31)])
def test_one_element_that_differs(place: tuple[int, int]) -> None:
    head = TABLE.copy()
    head[place] += 1
    _, change = apply(TieWeights(), graph(TEXT, table=TABLE, head=head.T.copy()))
    assert not change


def test_many_rows() -> None:
    table = np.arange(5000 * 4, dtype=np.float32).reshape(5000, 4) / 1000
    text = TEXT.replace("32", "4").replace("96", "5000")
    _after, change = apply(TieWeights(), graph(text, table=table, head=table.T.copy()))
    assert change
    other = table.copy()
    other[2047, 2] += 1
    _, change = apply(TieWeights(), graph(text, table=table, head=other.T.copy()))
    assert not change


def test_small_ones_are_left() -> None:
    text = TEXT.replace("32", "4").replace("96", "6")
    small = TABLE[:6, :4].copy()
    _, change = apply(TieWeights(), graph(text, table=small, head=small.T.copy()))
    assert not change


def test_quantized_ones_are_left() -> None:
    text = """
        g (int64[N] ids, float[N, 96] h) => (int8[N, 64] e, float[N, 96] y) {
            e = Gather (table, ids)
            w = DequantizeLinear (head, s)  x = Identity (w)  z = Slice (h, zero, k, one)  y = MatMul (z, x)
        }"""
    table = np.random.default_rng(0).integers(-100, 100, (96, 64)).astype(np.int8)
    more = {"zero": np.array([0]), "one": np.array([1]), "k": np.array([64]), "s": np.array(0.1, np.float32)}
    _, change = apply(TieWeights(), graph(text, table=table, head=table.T.copy(), **more))
    assert not change


def test_outputs_and_defaults_are_left() -> None:
    text = TEXT.replace("float[N, 96] y)", "float[N, 96] y, float[32, 96] head)")
    _, change = apply(TieWeights(), graph(text, table=TABLE, head=TABLE.T.copy()))
    assert not change
    text = TEXT.replace("float[N, 32] h)", "float[N, 32] h, float[32, 96] head)")
    _, change = apply(TieWeights(), graph(text, table=TABLE, head=TABLE.T.copy()))
    assert not change


def test_half_precision() -> None:
    text = TEXT.replace("float[", "float16[")
    half = TABLE.astype(np.float16)
    from cleanup_graphs import model_of

    from onnxslim_llm.rewrite.context import Context

    assert TieWeights().apply(model_of(graph(text, table=half, head=half.T.copy())), Context())
