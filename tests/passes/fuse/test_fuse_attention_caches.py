"""Caches in the layout of the concept become part of the node; all others stay outside, and nothing changes."""

from __future__ import annotations

import numpy as np
import pytest
from attention_models import BATCH, HEADS, SIZE, WIDTH, calls, form_of, fuse_parts

from onnxslim_llm.concepts.attention import AttentionForm

OPERANDS = "float[B, S, 32] q, float[B, S, 32] k, float[B, S, 32] v, float[B, 1, S, T] mask"
CACHED = {
    "inputs": f"{OPERANDS}, float[B, 4, P, 8] past_key, float[B, 4, P, 8] past_value",
    "outputs": "float[B, S, 32] y, float[B, 4, T, 8] present_key, float[B, 4, T, 8] present_value",
    "k": """
        k4 = Reshape (k, heads)
        kh = Transpose <perm = [0, 2, 1, 3]> (k4)
        present_key = Concat <axis = -2> (past_key, kh)
        kt = Transpose <perm = [0, 1, 3, 2]> (present_key)
    """,
    "v": """
        v4 = Reshape (v, heads)
        vh = Transpose <perm = [0, 2, 1, 3]> (v4)
        present_value = Concat <axis = 2> (past_value, vh)
    """,
    "mix": "mixed = MatMul (weights, present_value)",
}


def test_a_cache_becomes_part_of_the_node() -> None:
    fused = fuse_parts(**CACHED)
    (node,) = calls(fused)
    assert form_of(fused) == AttentionForm(bias=True, past=True, present=True)
    assert len(fused.model.graph.nodes) == 1
    assert [tensor.name for tensor in node.outputs] == ["y", "present_key", "present_value"]
    assert [tensor.name for tensor in node.inputs] == ["q", "k", "v", "past_key", "past_value", "mask"]


@pytest.mark.parametrize("size", [0, 1, 7])
def test_caches_of_other_lengths(size: int) -> None:
    past = np.ones((BATCH, HEADS, size, WIDTH), np.float32)
    mask = np.zeros((BATCH, 1, SIZE, size + SIZE), np.float32)
    fused = fuse_parts({"past_key": past, "past_value": past, "mask": mask}, **CACHED)
    assert form_of(fused).past


@pytest.mark.parametrize("kept", ["present_key", "present_value"])
def test_a_cache_that_is_no_output_stays_outside(kept: str) -> None:
    fused = fuse_parts(**{**CACHED, "outputs": f"float[B, S, 32] y, float[B, 4, T, 8] {kept}"})
    assert form_of(fused) == AttentionForm(bias=True, heads_major=True)
    assert fused.ops["Concat"] == 2


def test_a_present_that_is_not_what_the_keys_are_read_from() -> None:
    outputs = CACHED["outputs"].replace("float[B, 4, T, 8] present_key", "float[B, 4, S, 8] kh")
    fused = fuse_parts(**{**CACHED, "outputs": outputs})
    assert not form_of(fused).past


def test_a_mask_made_of_the_present_keeps_the_cache_outside() -> None:
    scores = """
        last = Constant <value_ints = [1, 3]> ()
        largest = ReduceMax <keepdims = 1> (present_key, last)
        row = Transpose <perm = [0, 1, 3, 2]> (largest)
        scaled = Mul (products, scale)
        sum = Add (mask, row)
        scores = Add (scaled, sum)
    """
    fused = fuse_parts(**{**CACHED, "scores": scores})
    assert not form_of(fused).past


def test_keys_appended_along_the_heads_are_no_cache() -> None:
    inputs = OPERANDS.replace("32] k", "16] k").replace("32] v", "16] v").replace("T]", "S]")
    fused = fuse_parts(
        constants={"two": np.array([0, 0, 2, 8])},
        inputs=f"{inputs}, float[B, 2, S, 8] past_key, float[B, 2, S, 8] past_value",
        outputs="float[B, S, 32] y, float[B, 4, S, 8] present_key, float[B, 4, S, 8] present_value",
        k=CACHED["k"].replace("axis = -2", "axis = 1").replace("heads", "two"),
        v=CACHED["v"].replace("axis = 2", "axis = 1").replace("heads", "two"),
        mix=CACHED["mix"],
    )
    assert form_of(fused) == AttentionForm(bias=True, heads_major=True)
    assert fused.ops["Concat"] == 2


def test_one_cache_for_keys_and_values_stays_outside() -> None:
    fused = fuse_parts(
        **{
            **CACHED,
            "outputs": "float[B, S, 32] y, float[B, 4, T, 8] present_key",
            "v": "",
            "mix": "mixed = MatMul (weights, present_key)",
        }
    )
    assert not form_of(fused).past


def test_one_past_for_two_presents() -> None:
    fused = fuse_parts(**{**CACHED, "v": CACHED["v"].replace("past_value", "past_key")})
    (node,) = calls(fused)
    assert form_of(fused).past
    assert node.inputs[3] is node.inputs[4]


def test_a_cache_of_transposed_keys_stays_outside() -> None:
    fused = fuse_parts(
        **{
            **CACHED,
            "inputs": CACHED["inputs"].replace("float[B, 4, P, 8] past_key", "float[B, 4, 8, P] past_key"),
            "outputs": CACHED["outputs"].replace("float[B, 4, T, 8] present_key", "float[B, 4, 8, T] present_key"),
            "k": """
                k4 = Reshape (k, heads)
                kh = Transpose <perm = [0, 2, 3, 1]> (k4)
                present_key = Concat <axis = 3> (past_key, kh)
            """,
            "products": "products = MatMul (qt, present_key)",
        }
    )
    assert not form_of(fused).past
    assert fused.ops["Concat"] == 2


def test_keys_and_values_stacked_in_one_cache_stay_outside() -> None:
    zero_one = {"first": np.array(0), "second": np.array(1), "front": np.array([0])}
    fused = fuse_parts(
        constants=zero_one,
        inputs=f"{OPERANDS}, float[2, B, 4, P, 8] past",
        outputs="float[B, S, 32] y, float[2, B, 4, T, 8] present",
        k="past_key = Gather <axis = 0> (past, first)\n" + CACHED["k"],
        v="past_value = Gather <axis = 0> (past, second)\n" + CACHED["v"],
        mix=CACHED["mix"],
        weights="""
            one = Unsqueeze (present_key, front)
            other = Unsqueeze (present_value, front)
            present = Concat <axis = 0> (one, other)
        """,
    )
    assert form_of(fused) == AttentionForm(bias=True, heads_major=True)


def test_a_quantized_cache_stays_outside() -> None:
    codes = "{0}_codes = QuantizeLinear ({0}h, step)\npresent_{1} = Concat <axis = 2> (past_{1}, {0}_codes)\n"
    back = "{0}d = DequantizeLinear (present_{1}, step)\n"
    split = "{0}4 = Reshape ({0}, heads)\n{0}h = Transpose <perm = [0, 2, 1, 3]> ({0}4)\n"
    text = split + codes + back
    fused = fuse_parts(
        constants={"step": np.array(0.05, np.float32)},
        inputs=f"{OPERANDS}, uint8[B, 4, P, 8] past_key, uint8[B, 4, P, 8] past_value",
        outputs="float[B, S, 32] y, uint8[B, 4, T, 8] present_key, uint8[B, 4, T, 8] present_value",
        k=text.format("k", "key") + "kt = Transpose <perm = [0, 1, 3, 2]> (kd)",
        v=text.format("v", "value"),
        mix="mixed = MatMul (weights, vd)",
    )
    assert form_of(fused) == AttentionForm(bias=True, heads_major=True)
    assert fused.ops["DequantizeLinear"] == 2


def test_two_layers_that_read_one_cache() -> None:
    again = """
        qb = Relu (qt)
        products_2 = MatMul (qb, kt)
        scores_2 = Add (products_2, mask)
        weights_2 = Softmax <axis = -1> (scores_2)
        mixed_2 = MatMul (weights_2, present_value)
        back_2 = Transpose <perm = [0, 2, 1, 3]> (mixed_2)
        y_2 = Reshape (back_2, flat)
    """
    result = "back = Transpose <perm = [0, 2, 1, 3]> (mixed)\ny = Reshape (back, flat)\n" + again
    outputs = CACHED["outputs"] + ", float[B, S, 32] y_2"
    fused = fuse_parts(**{**CACHED, "result": result, "outputs": outputs})
    first, second = calls(fused)
    assert [tensor.name for tensor in second.inputs[1:3]] == [tensor.name for tensor in first.outputs[1:]]
