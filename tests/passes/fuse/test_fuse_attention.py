"""Attentions in many spellings become one node that means the same."""

from __future__ import annotations

import numpy as np
import pytest
from attention_models import BATCH, HEADS, SIZE, WIDTH, attention, calls, feeds_of, form_of, fuse_parts
from fusion_checks import fuse
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim_llm.concepts.attention import AttentionForm
from onnxslim_llm.passes.fuse.fuse_attention import FuseAttention

PLAIN = AttentionForm(bias=True)
#: Float16 has 11 bits; sums of eight products around one are rounded three times.
HALF_TOLERANCE = 8 * 2.0**-10


def test_the_plain_one_is_one_node() -> None:
    fused = fuse_parts()
    (node,) = calls(fused)
    assert len(fused.model.graph.nodes) == 1
    assert form_of(fused) == PLAIN
    assert [tensor.name for tensor in node.inputs] == ["q", "k", "v", "mask"]
    assert (node.attrs["q_num_heads"], node.attrs["kv_num_heads"]) == (HEADS, HEADS)
    assert node.attrs["scale"] == pytest.approx(0.3)


SPELLINGS = {
    "keys are transposed twice": {
        "k": """
            k4 = Reshape (k, heads)
            kh = Transpose <perm = [0, 2, 1, 3]> (k4)
            kt = Transpose <perm = [0, 1, 3, 2]> (kh)
        """
    },
    "keys pass through three axes": {
        "k": """
            k4 = Reshape (k, heads)
            kh = Transpose <perm = [0, 2, 1, 3]> (k4)
            three = Constant <value_ints = [-1, 5, 8]> ()
            k3 = Reshape (kh, three)
            k3t = Transpose <perm = [0, 2, 1]> (k3)
            four = Constant <value_ints = [2, 4, 8, 5]> ()
            kt = Reshape (k3t, four)
        """,
        "inputs": "float[2, 5, 32] q, float[2, 5, 32] k, float[2, 5, 32] v, float[2, 1, 5, 5] mask",
        "outputs": "float[2, 5, 32] y",
    },
    "the scale is on both operands": {
        "products": """
            root = Sqrt (scale)
            one = Constant <value_float = 0.5> ()
            two = Constant <value_float = 0.6> ()
            qs = Mul (qt, one)
            ks = Mul (two, kt)
            scaled = MatMul (qs, ks)
        """,
        "scores": "scores = Add (mask, scaled)",
    },
    "queries are scaled before they are split": {
        "q": """
            qs = Mul (q, scale)
            q4 = Reshape (qs, heads)
            qt = Transpose <perm = [0, 2, 1, 3]> (q4)
        """,
        "scores": "scores = Add (products, mask)",
    },
    "division": {
        "scores": """
            divisor = Constant <value_floats = [3.3333333]> ()
            scaled = Div (products, divisor)
            scores = Add (scaled, mask)
        """
    },
    "nothing happens in between": {
        "scores": """
            scaled = Mul (products, scale)
            same = Identity (scaled)
            scores = Add (same, mask)
        """,
        "weights": """
            weights_1 = Identity (weights)
            weights_2, dropped = Dropout (weights_1)
        """,
        "mix": "mixed = MatMul (weights_2, vt)",
    },
    "equations": {
        "q": "qt = Reshape (q, heads)",
        "k": "kt = Reshape (k, heads)",
        "v": "vt = Reshape (v, heads)",
        "products": 'products = Einsum <equation = "bshd,bthd->bhst"> (qt, kt)',
        "mix": 'back = Einsum <equation = "bhst,bthd->bshd"> (weights, vt)',
        "result": "y = Reshape (back, flat)",
    },
    "equations with exchanged operands": {
        "q": "qt = Reshape (q, heads)",
        "k": "kt = Reshape (k, heads)",
        "v": "vt = Reshape (v, heads)",
        "products": 'products = Einsum <equation = "bthd,bshd->bhst"> (kt, qt)',
        "mix": 'back = Einsum <equation = "bthd,bhst->bshd"> (vt, weights)',
        "result": "y = Reshape (back, flat)",
    },
    "a mask of two axes": {"inputs": "float[B, S, 32] q, float[B, S, 32] k, float[B, S, 32] v, float[S, S] mask"},
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    fused = fuse_parts(**SPELLINGS[name])
    (node,) = calls(fused)
    assert form_of(fused) == PLAIN
    assert [tensor.name for tensor in node.inputs[:3]] == ["q", "k", "v"]
    assert node.attrs["scale"] == pytest.approx(0.3)
    moves = {"Transpose", "MatMul", "Mul", "Softmax"}
    assert not moves & set(fused.ops)


def test_no_scale_and_no_mask() -> None:
    fused = fuse_parts(
        scores="scores = Identity (products)",
        inputs="float[B, S, 32] q, float[B, S, 32] k, float[B, S, 32] v",
    )
    assert form_of(fused) == AttentionForm()
    assert calls(fused)[0].attrs["scale"] == 1.0


def test_operands_by_head_stay_by_head() -> None:
    fused = fuse_parts(
        inputs="float[B, 4, S, 8] qt, float[B, 4, S, 8] k4, float[B, 4, S, 8] vt, float[B, 1, S, S] mask",
        outputs="float[B, 4, S, 8] mixed",
        q="",
        k="kt = Transpose <perm = [0, 1, 3, 2]> (k4)",
        v="",
        result="",
    )
    assert form_of(fused) == AttentionForm(heads_major=True, bias=True)
    assert len(fused.model.graph.nodes) == 1


def test_batch_and_heads_on_one_axis() -> None:
    shapes = {
        "by_head": np.array([BATCH * HEADS, SIZE, WIDTH]),
        "four": np.array([BATCH, HEADS, SIZE, WIDTH]),
        "heads": np.array([BATCH, SIZE, HEADS, WIDTH]),
    }
    flat = "{0}4 = Reshape ({0}, heads)\n{0}h = Transpose <perm = [0, 2, 1, 3]> ({0}4)\n{0}3 = Reshape ({0}h, by_head)"
    fused = fuse_parts(
        inputs="float[2, 5, 32] q, float[2, 5, 32] k, float[2, 5, 32] v, float[8, 1, 5] alibi, float[2, 1, 5, 5] mask",
        outputs="float[2, 5, 32] y",
        q=flat.format("q"),
        k=flat.format("k") + "\nkt = Transpose <perm = [0, 2, 1]> (k3)",
        v=flat.format("v"),
        products="products = MatMul (q3, kt)",
        scores="""
            scaled = Mul (products, scale)
            sloped = Add (alibi, scaled)
            by_batch = Constant <value_ints = [2, 4, 5, 5]> ()
            apart = Reshape (sloped, by_batch)
            scores = Add (apart, mask)
        """,
        weights="""
            together = Constant <value_ints = [8, 5, 5]> ()
            weights_3 = Reshape (weights, together)
        """,
        mix="mixed_3 = MatMul (weights_3, v3)\nmixed = Reshape (mixed_3, four)",
        constants=shapes,
    )
    (node,) = calls(fused)
    assert form_of(fused) == PLAIN
    assert [tensor.name for tensor in node.inputs[:3]] == ["q", "k", "v"]


def test_one_head_without_an_axis() -> None:
    fused = fuse_parts(
        inputs="float[B, S, 32] q, float[B, S, 32] k, float[B, S, 32] vt, float[B, S, S] mask",
        q="",
        k="kt = Transpose <perm = [0, 2, 1]> (k)",
        v="",
        products="products = MatMul (q, kt)",
        mix="y = MatMul (weights, vt)",
        result="",
    )
    (node,) = calls(fused)
    assert node.attrs["q_num_heads"] == 1
    assert form_of(fused) == PLAIN


def test_softcap() -> None:
    fused = fuse_parts(
        scores="""
            cap = Constant <value_float = 2.0> ()
            scaled = Mul (products, scale)
            divided = Div (scaled, cap)
            bent = Tanh (divided)
            capped = Mul (bent, cap)
            scores = Add (capped, mask)
        """
    )
    assert form_of(fused) == AttentionForm(bias=True, softcap=True)
    assert calls(fused)[0].attrs["softcap"] == 2.0
    assert calls(fused)[0].attrs["scale"] == pytest.approx(0.3)


def test_softmax_in_float32() -> None:
    half = "float16[B, S, 32] q, float16[B, S, 32] k, float16[B, S, 32] v, float16[B, 1, S, S] mask"
    fused = fuse_parts(
        inputs=half,
        outputs="float16[B, S, 32] y",
        softmax="wide = Cast <to = 1> (scores)\nweights_1 = Softmax <axis = -1> (wide)",
        weights="weights = Cast <to = 10> (weights_1)",
        constants={"scale": np.array(0.3, np.float16)},
        tolerance=HALF_TOLERANCE,
    )
    assert form_of(fused) == AttentionForm(bias=True, float_softmax=True)


def test_cross_attention() -> None:
    fused = fuse_parts(
        inputs="float[B, S, 32] q, float[B, T, 32] k, float[B, T, 32] v",
        scores="scores = Mul (products, scale)",
    )
    assert form_of(fused) == AttentionForm()


def test_values_of_another_width() -> None:
    fused = fuse_parts(
        inputs="float[B, S, 32] q, float[B, S, 32] k, float[B, S, 24] v, float[B, 1, S, S] mask",
        outputs="float[B, S, 24] y",
        v="""
            v_heads = Constant <value_ints = [0, 0, 4, 6]> ()
            v4 = Reshape (v, v_heads)
            vt = Transpose <perm = [0, 2, 1, 3]> (v4)
        """,
        constants={"flat": np.array([0, 0, 24])},
    )
    assert len(fused.model.graph.nodes) == 1


def test_packed_projections_are_split_outside() -> None:
    fused = fuse_parts(
        inputs="float[B, S, 96] packed, float[B, 1, S, S] mask",
        q="""
            sizes = Constant <value_ints = [32, 32, 32]> ()
            q, k, v = Split <axis = 2> (packed, sizes)
            q4 = Reshape (q, heads)
            qt = Transpose <perm = [0, 2, 1, 3]> (q4)
        """,
    )
    assert fused.ops == {"Constant": 1, "Split": 1, "Attention_Bias": 1}


def test_batch_and_sequence_of_one() -> None:
    fused = fuse_parts(
        inputs="float[1, 1, 32] q, float[1, T, 32] k, float[1, T, 32] v, float[1, 1, 1, T] mask",
        outputs="float[1, 1, 32] y",
        q="by_head = Constant <value_ints = [1, 4, 1, 8]> ()\nqt = Reshape (q, by_head)",
        result="y = Reshape (mixed, flat)",
        constants={"flat": np.array([1, 1, 32])},
    )
    assert form_of(fused) == PLAIN
    assert len(fused.model.graph.nodes) == 1


def test_inside_a_branch() -> None:
    inner = attention()
    source = attention(
        inputs="bool yes, float[B, S, 32] q, float[B, S, 32] k, float[B, S, 32] v, float[B, 1, S, S] mask",
        q="", k="", v="", products="", scores="", softmax="", mix="",
        result="""
            y = If (yes) <then_branch = g1 () => (float[B, S, 32] z) { z = Add (q, k) },
                          else_branch = g2 () => (float[B, S, 32] z) { z = Add (q, v) }>
        """,
    )  # fmt: skip
    then = next(a.g for a in source.graph.node[0].attribute if a.name == "then_branch")
    del then.node[:]
    then.node.extend(inner.graph.node)
    then.initializer.extend(inner.graph.initializer)
    then.output[0].name = "y_inner"
    then.node[-1].output[0] = "y_inner"
    fused = fuse(FuseAttention(), source, {**feeds_of(source), "yes": np.array(True)})
    assert form_of(fused) == PLAIN


@pytest.mark.parametrize("opset", [11, 12, 13, 17, 18, 21, 23])
def test_opsets(opset: int) -> None:
    fused = fuse_parts(opset=opset, softmax="weights = Softmax <axis = 3> (scores)")
    assert form_of(fused) == PLAIN
    assert fused.model.opset() == max(opset, 18)


def test_an_old_opset_is_raised_only_if_there_is_something_to_fuse() -> None:
    left = fuse_parts(opset=14, softmax="weights = Softmax <axis = 2> (scores)")
    assert left.model.opset() == 14


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(["keys are transposed twice", "division", "queries are scaled before they are split", ""]),
    st.sampled_from(["keys are transposed twice", "nothing happens in between", ""]),
    st.sampled_from(["b, 4, s, t", "1, 1, s, t", "b, 1, 1, t", "4, 1, t", "s, t", "t"]),
    st.booleans(),
    st.booleans(),
)
def test_any_combination(first: str, second: str, mask: str, softcap: bool, cross: bool) -> None:
    keys = "T" if cross else "S"
    sizes = mask.replace("b", "B").replace("s", "S").replace("t", keys)
    parts = {**SPELLINGS.get(second, {}), **SPELLINGS.get(first, {})}
    parts["inputs"] = f"float[B, S, 32] q, float[B, {keys}, 32] k, float[B, {keys}, 32] v, float[{sizes}] mask"
    if softcap:
        parts["scores"] = """
            two = Constant <value_float = 2.0> ()
            bent = Tanh (products)
            capped = Mul (two, bent)
            scores = Add (mask, capped)
        """
    fused = fuse_parts(**parts)
    assert form_of(fused) == AttentionForm(bias=True, softcap=softcap)
    assert "MatMul" not in fused.ops
