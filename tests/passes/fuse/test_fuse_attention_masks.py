"""Masks of all kinds are carried as one tensor that is added."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from attention_models import BATCH, SIZE, Array, attention, calls, feeds_of, form_of, fuse_parts
from fusion_checks import Fused, fuse

from onnxslim_llm.rewrite.pipeline import Pipeline

BOOLEAN = "float[B, S, 32] q, float[B, S, 32] k, float[B, S, 32] v, bool[B, 1, S, S] seen"

MASKS = {
    "added twice": (
        "float[B, 1, S, S] mask",
        "once = Add (scaled, mask)\nscores = Add (once, mask)",
    ),
    "two": (
        "float[B, 1, S, S] mask, float[1, 4, S, S] bias",
        "once = Add (bias, scaled)\nscores = Add (once, mask)",
    ),
    "kept": ("bool[B, 1, S, S] seen", "scores = Where (seen, scaled, lowest)"),
    "dropped": ("bool[B, 1, S, S] seen", "gone = Not (seen)\nscores = Where (gone, minus_inf, scaled)"),
    "kept, then added": (
        "bool[1, 1, S, S] seen, float[B, 1, 1, S] mask",
        "kept = Where (seen, scaled, lowest)\nscores = Add (kept, mask)",
    ),
    "added, then kept": (
        "bool[1, 1, S, S] seen, float[B, 1, 1, S] mask",
        "sum = Add (mask, scaled)\nscores = Where (seen, sum, lowest)",
    ),
    "kept twice": (
        "bool[1, 1, S, S] seen, bool[B, 1, 1, S] padding",
        "once = Where (seen, scaled, lowest)\nscores = Where (padding, once, lowest)",
    ),
    "scaled with the scores": (
        "float[B, 1, S, S] mask",
        "sum = Add (products, mask)\nscores = Mul (sum, scale)",
    ),
    "bounded": ("float[B, 1, S, S] mask", "sum = Add (scaled, mask)\nscores = Max (sum, lowest)"),
    "bounded before": ("float[B, 1, S, S] mask", "low = Max (lowest, scaled)\nscores = Add (low, mask)"),
}


def fuse_mask(name: str, feeds: dict[str, Array] | None = None) -> Fused:
    inputs, scores = MASKS[name]
    return fuse_parts(
        feeds,
        inputs=f"float[B, S, 32] q, float[B, S, 32] k, float[B, S, 32] v, {inputs}",
        scores=f"scaled = Mul (products, scale)\n{scores}" if "scaled" in scores else scores,
    )


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    fused = fuse_mask(name)
    assert form_of(fused).bias
    assert calls(fused)[0].attrs["scale"] == pytest.approx(0.3)


@pytest.mark.parametrize("name", ["kept", "dropped", "kept, then added", "kept twice"])
def test_queries_that_see_nothing(name: str) -> None:
    seen = np.tril(np.ones((1, 1, SIZE, SIZE), bool))
    seen[..., 0, :] = False
    if "bool[B, 1, S, S]" in MASKS[name][0]:
        seen = np.repeat(seen, BATCH, 0)
    assert form_of(fuse_mask(name, {"seen": seen})).bias


def test_a_finite_number_that_hides() -> None:
    fused = fuse_parts(
        {"seen": np.tril(np.ones((BATCH, 1, SIZE, SIZE), bool))},
        constants={"low": np.array(-1e9, np.float32)},
        inputs=BOOLEAN,
        scores="scaled = Mul (products, scale)\nscores = Where (seen, scaled, low)",
    )
    assert form_of(fused).bias


def test_a_mask_that_layers_share_is_made_once() -> None:
    layer = attention(inputs=BOOLEAN, scores="scaled = Mul (products, scale)\nscores = Where (seen, scaled, lowest)")
    second = [onnx.NodeProto.FromString(node.SerializeToString()) for node in layer.graph.node]
    renamed = {name: f"{name}_2" for node in second for name in node.output} | {"q": "y"}
    for node in second:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed[name] for name in node.output]
    layer.graph.node.extend(second)
    layer.graph.output[0].name = "y_2"
    fused = fuse("cleanup, fuse_attention", layer, feeds_of(layer))
    Pipeline("cleanup").run(fused.model)
    assert [node.op for node in fused.model.graph.nodes] == ["Where", "Attention_Bias", "Attention_Bias"]


EMPTY_ROWS = {
    "any is seen": """
        hidden = Equal (scores, minus_inf)
        visible = Not (hidden)
        numbers = Cast <to = 7> (visible)
        most = ReduceMax <keepdims = 1> (numbers, last)
        some = Cast <to = 9> (most)
        empty = Not (some)
        kept = Where (empty, zero, weights)
    """,
    "all are hidden": """
        hidden = IsInf <detect_positive = 0> (scores)
        numbers = Cast <to = 6> (hidden)
        least = ReduceMin <keepdims = 1> (numbers, last)
        empty = Cast <to = 9> (least)
        sizes = Constant <value_ints = [2, 4, 5, 5]> ()
        zeros = ConstantOfShape (sizes)
        kept = Where (empty, zeros, weights)
    """,
    "the mask is asked": """
        largest = ReduceMax (mask, last)
        empty = Equal (largest, minus_inf)
        kept = Where (empty, zero, weights)
    """,
    "NaN": """
        lost = IsNaN (weights)
        kept = Where (lost, zero, weights)
    """,
}
NOT_EMPTY_ROWS = {
    "any is hidden": EMPTY_ROWS["all are hidden"].replace("ReduceMin", "ReduceMax"),
    "any is seen, not negated": EMPTY_ROWS["any is seen"].replace("empty = Not (some)", "empty = Identity (some)"),
    "over the queries": EMPTY_ROWS["any is seen"].replace("last)", "before_last)"),
    "another number": EMPTY_ROWS["any is seen"].replace("zero", "one"),
    "the smallest of the mask": EMPTY_ROWS["the mask is asked"].replace("ReduceMax", "ReduceMin"),
    "plus infinity": EMPTY_ROWS["all are hidden"].replace("detect_positive", "detect_negative"),
}


def fuse_rows(text: str) -> Fused:
    mask = np.zeros((BATCH, 1, SIZE, SIZE), np.float32)
    mask[0, :, :2] = -np.inf
    mask[1, :, :, 3] = -np.inf
    more = {"last": np.array([-1]), "before_last": np.array([-2]), "one": np.array(1, np.float32)}
    return fuse_parts(
        {"mask": mask},
        constants=more,
        weights=text,
        mix="mixed = MatMul (kept, vt)",
    )


@pytest.mark.parametrize("name", EMPTY_ROWS)
def test_rows_that_see_nothing(name: str) -> None:
    assert form_of(fuse_rows(EMPTY_ROWS[name])).zero_rows


@pytest.mark.parametrize("name", NOT_EMPTY_ROWS)
def test_other_rows_are_replaced(name: str) -> None:
    fused = fuse_rows(NOT_EMPTY_ROWS[name])
    assert not fused.sites
    assert "weights" in fused.reasons
