"""Repeated key and value heads are found in every spelling, and only where they are repeated one by one."""

from __future__ import annotations

import numpy as np
import pytest
from attention_models import calls, form_of, fuse_parts

from onnxslim_llm.concepts.attention import AttentionForm

GROUPED = AttentionForm(bias=True, grouped=True)
INPUTS = "float[B, S, 32] q, float[B, S, 16] k, float[B, S, 16] v, float[B, 1, S, S] mask"

#: {0} is a tensor [B, 2, S, 8], {1} what becomes of it: [B, 4, S, 8].
REPEATS = {
    "expand": """
        axis_{0} = Constant <value_ints = [2]> ()
        u_{0} = Unsqueeze ({0}, axis_{0})
        sizes_{0} = Constant <value_ints = [1, 1, 2, 1, 1]> ()
        e_{0} = Expand (u_{0}, sizes_{0})
        four_{0} = Constant <value_ints = [0, 4, -1, 8]> ()
        {1} = Reshape (e_{0}, four_{0})
    """,
    "tile": """
        axis_{0} = Constant <value_ints = [2]> ()
        u_{0} = Unsqueeze ({0}, axis_{0})
        sizes_{0} = Constant <value_ints = [1, 1, 2, 1, 1]> ()
        e_{0} = Tile (u_{0}, sizes_{0})
        four_{0} = Constant <value_ints = [0, 4, -1, 8]> ()
        {1} = Reshape (e_{0}, four_{0})
    """,
    "copies": """
        axis_{0} = Constant <value_ints = [2]> ()
        u_{0} = Unsqueeze ({0}, axis_{0})
        e_{0} = Concat <axis = 2> (u_{0}, u_{0})
        four_{0} = Constant <value_ints = [0, 4, -1, 8]> ()
        {1} = Reshape (e_{0}, four_{0})
    """,
    "gather": """
        places_{0} = Constant <value_ints = [0, 0, 1, 1]> ()
        {1} = Gather <axis = 1> ({0}, places_{0})
    """,
}
#: The whole group is repeated: query heads 0 and 2 read key head 0.
OTHER_ORDERS = {
    "tile": "sizes_{0} = Constant <value_ints = [1, 2, 1, 1]> ()\n{1} = Tile ({0}, sizes_{0})",
    "copies": "{1} = Concat <axis = 1> ({0}, {0})",
    "gather": "places_{0} = Constant <value_ints = [0, 1, 0, 1]> ()\n{1} = Gather <axis = 1> ({0}, places_{0})",
    "none": "places_{0} = Constant <value_ints = [1, 0, 1, 1]> ()\n{1} = Gather <axis = 1> ({0}, places_{0})",
}
SPLIT = "{0}4 = Reshape ({0}, two)\n{0}h = Transpose <perm = [0, 2, 1, 3]> ({0}4)\n"
TWO = {"two": np.array([0, 0, 2, 8])}


def parts_of(keys: str, values: str) -> dict[str, str]:
    return {
        "inputs": INPUTS,
        "k": SPLIT.format("k") + keys.format("kh", "kr") + "\nkt = Transpose <perm = [0, 1, 3, 2]> (kr)",
        "v": SPLIT.format("v") + values.format("vh", "vt"),
    }


@pytest.mark.parametrize("name", REPEATS)
def test_repeated_heads(name: str) -> None:
    fused = fuse_parts(constants=TWO, **parts_of(REPEATS[name], REPEATS[name]))
    (node,) = calls(fused)
    assert form_of(fused) == GROUPED
    assert (node.attrs["q_num_heads"], node.attrs["kv_num_heads"]) == (4, 2)
    assert [tensor.name for tensor in node.inputs] == ["q", "k", "v", "mask"]


@pytest.mark.parametrize("name", OTHER_ORDERS)
def test_another_order_stays_outside(name: str) -> None:
    fused = fuse_parts(constants=TWO, **parts_of(OTHER_ORDERS[name], OTHER_ORDERS[name]))
    assert calls(fused)[0].attrs["kv_num_heads"] == 4
    assert not form_of(fused).grouped


def test_keys_and_values_repeated_in_different_orders() -> None:
    fused = fuse_parts(constants=TWO, **parts_of(REPEATS["expand"], OTHER_ORDERS["tile"]))
    assert calls(fused)[0].attrs["kv_num_heads"] == 4


def test_keys_are_repeated_and_values_are_not() -> None:
    parts = parts_of(REPEATS["expand"], "")
    parts["inputs"] = INPUTS.replace("16] v", "32] v")
    parts.pop("v")
    fused = fuse_parts(constants=TWO, **parts)
    assert calls(fused)[0].attrs["kv_num_heads"] == 4


def test_one_key_head_for_all_by_broadcasting() -> None:
    one = "{0}1 = Unsqueeze ({0}, first)\n"
    fused = fuse_parts(
        constants={"first": np.array([1])},
        inputs=INPUTS.replace("16]", "8]"),
        k=one.format("k") + "kt = Transpose <perm = [0, 1, 3, 2]> (k1)",
        v="vt = Unsqueeze (v, first)",
    )
    (node,) = calls(fused)
    assert form_of(fused) == GROUPED
    assert node.attrs["kv_num_heads"] == 1
    assert len(fused.model.graph.nodes) == 1


def test_groups_as_an_axis_of_their_own() -> None:
    fused = fuse_parts(
        constants={
            "groups": np.array([0, 0, 2, 2, 8]),
            "one_each": np.array([0, 0, 2, 1, 8]),
            "flat": np.array([0, 0, 32]),
        },
        inputs=INPUTS.replace("float[B, 1, S, S]", "float[B, 1, 1, S, S]"),
        q="q5 = Reshape (q, groups)\nqt = Transpose <perm = [0, 2, 3, 1, 4]> (q5)",
        k="k5 = Reshape (k, one_each)\nkt = Transpose <perm = [0, 2, 3, 4, 1]> (k5)",
        v="v5 = Reshape (v, one_each)\nvt = Transpose <perm = [0, 2, 3, 1, 4]> (v5)",
        result="back = Transpose <perm = [0, 3, 1, 2, 4]> (mixed)\ny = Reshape (back, flat)",
    )
    assert form_of(fused) == GROUPED
    assert set(fused.ops) == {"Attention_Bias_Grouped", "Squeeze"}  # of the mask


def test_heads_repeated_behind_a_cache() -> None:
    fused = fuse_parts(
        constants=TWO,
        inputs=INPUTS.replace("float[B, 1, S, S]", "float[B, 1, S, T]")
        + ", float[B, 2, P, 8] past_key, float[B, 2, P, 8] past_value",
        outputs="float[B, S, 32] y, float[B, 2, T, 8] present_key, float[B, 2, T, 8] present_value",
        k=SPLIT.format("k")
        + "present_key = Concat <axis = 2> (past_key, kh)"
        + REPEATS["expand"].format("present_key", "kr")
        + "kt = Transpose <perm = [0, 1, 3, 2]> (kr)",
        v=SPLIT.format("v")
        + "present_value = Concat <axis = 2> (past_value, vh)"
        + REPEATS["expand"].format("present_value", "vt"),
    )
    assert form_of(fused) == AttentionForm(bias=True, past=True, present=True, grouped=True)
    assert fused.ops["Concat"] == 0


def test_a_scale_for_each_head_is_part_of_the_queries() -> None:
    fused = fuse_parts(
        constants={"per_head": np.linspace(0.1, 0.4, 4, dtype=np.float32).reshape(4, 1, 1)},
        products="qs = Mul (qt, per_head)\nproducts = MatMul (qs, kt)",
    )
    assert form_of(fused).bias
    assert fused.ops["Mul"] == 1
