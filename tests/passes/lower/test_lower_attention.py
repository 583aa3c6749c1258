"""Attentions of all forms give in ONNX Runtime's operators what the concept's body gives."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from lowered_attention import ATOL, assert_same, attention_model, feeds_for, run

from onnxslim_llm.concepts.attention import AttentionForm
from onnxslim_llm.ir.model import Model
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.passes import Change, Skip
from onnxslim_llm.rewrite.pipeline import Pipeline

CACHED = AttentionForm(past=True, present=True, causal=True, grouped=True)
SIZES = [
    {"B": 1, "S": 1, "P": 5, "E": 6},
    {"B": 1, "S": 4, "P": 0, "E": 6},
    {"B": 1, "S": 3, "P": 6, "E": 6},
    {"B": 3, "S": 1, "P": 7, "E": 6},
    {"B": 2, "S": 5, "P": 0, "E": 6},
]
CHUNKS_OF_BATCHES = {"B": 2, "S": 3, "P": 4, "E": 6}


def lower(model: Model, operator: str) -> Change:
    (record,) = Pipeline(f'lower_attention{{operator="{operator}"}}').run(model)
    onnx.checker.check_model(model.to_proto())
    return Change(["x"] * record.changed, list(record.skipped))


def ops(model: Model) -> list[str]:
    return [node.op for node in model.graph.nodes]


FORMS: dict[str, tuple[AttentionForm, dict[str, Any]]] = {
    "cache": (CACHED, {}),
    "heads first": (replace(CACHED, heads_major=True), {}),
    "all heads": (replace(CACHED, grouped=False), {}),
    "no cache": (AttentionForm(causal=True), {}),
    "presents only": (AttentionForm(causal=True, present=True), {}),
    "softcap": (replace(CACHED, softcap=True, bias=True), {"bias": ("B", 1, 1, "T")}),
    "padding": (replace(CACHED, bias=True), {"bias": ("B", 1, 1, "T")}),
    "padding, heads first": (replace(CACHED, bias=True, heads_major=True), {"bias": ("B", 1, 1, "T")}),
    "bias by head": (replace(CACHED, bias=True), {"bias": (1, "H", 1, "T")}),
    "whole bias": (replace(CACHED, bias=True), {"bias": ("B", "H", "S", "T")}),
    "table": (replace(CACHED, bias=True), {"bias": ("S", "T")}),
    "flat bias": (replace(CACHED, bias=True), {"bias": ("T",)}),
    "bias by row": (replace(CACHED, bias=True), {"bias": ("S", 1)}),
    "window": (replace(CACHED, window=True), {"window": 3}),
    "window and padding": (replace(CACHED, window=True, bias=True), {"window": 3, "bias": ("B", 1, 1, "T")}),
    "window of one": (replace(CACHED, window=True), {"window": 1}),
    "rows of zeros": (replace(CACHED, zero_rows=True, window=True), {"window": 2}),
}
OTHERS: dict[str, tuple[AttentionForm, dict[str, Any]]] = {
    "encoder": (AttentionForm(), {}),
    "encoder with padding": (AttentionForm(bias=True), {"bias": ("B", 1, 1, "T")}),
    "cross attention": (AttentionForm(bias=True), {"bias": ("B", 1, 1, "T"), "cross": True}),
    "causal among other keys": (AttentionForm(causal=True), {"cross": True}),
    "cache that sees everything": (AttentionForm(past=True, present=True), {}),
    "window to one side": (AttentionForm(past=True, present=True, window=True), {"window": 3}),
    "cache that is not returned": (AttentionForm(past=True, causal=True), {}),
}


@pytest.mark.parametrize("name", [*FORMS, *OTHERS])
def test_standard_attention(name: str) -> None:
    form, options = {**FORMS, **OTHERS}[name]
    model = attention_model(form, **options)
    before = model.copy()
    assert lower(model, "standard")
    assert ops(model).count("Attention") == 1
    assert model.opset() == 24
    for sizes in [*SIZES, CHUNKS_OF_BATCHES]:
        assert_same(before, model, sizes)


@pytest.mark.parametrize("name", FORMS)
def test_grouped_attention(name: str) -> None:
    form, options = FORMS[name]
    model = attention_model(form, **options)
    before = model.copy()
    assert lower(model, "contrib")
    assert ops(model).count("GroupQueryAttention") == 1
    for sizes in SIZES:
        assert_same(before, model, sizes)


def test_grouped_attention_refuses_chunks_of_batches() -> None:
    """The restriction that the pass documents; if a release of ONNX Runtime lifts it, so can we."""
    model = attention_model(CACHED)
    lower(model, "contrib")
    with pytest.raises(Exception, match="batch_size must be 1"):
        run(model, feeds_for(model, CHUNKS_OF_BATCHES))


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "cache that is not returned"])
def test_what_is_not_causal_becomes_multi_head_attention(name: str) -> None:
    form, options = OTHERS[name]
    model = attention_model(form, **options)
    before = model.copy()
    assert not lower(model, "contrib").skipped
    assert ops(model).count("MultiHeadAttention") == 1
    for sizes in [*SIZES, CHUNKS_OF_BATCHES]:
        assert_same(before, model, sizes)


def test_heads_of_odd_sizes() -> None:
    """GroupQueryAttention takes multiples of 8 only."""
    grouped, by_head = (attention_model(replace(CACHED, grouped=flag), width=12) for flag in (True, False))
    for model, op in ((grouped, "Attention"), (by_head, "MultiHeadAttention")):
        before = model.copy()
        lower(model, "contrib")
        assert ops(model).count(op) == 1
        assert_same(before, model, CHUNKS_OF_BATCHES)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (OTHERS["cache that is not returned"][0], "its cache is not returned"),
        (AttentionForm(grouped=True), "fewer heads of keys"),
        (AttentionForm(softcap=True), "its scores are capped"),
    ],
)
def test_what_neither_can_express_becomes_attention(form: AttentionForm, reason: str) -> None:
    model = attention_model(form)
    before = model.copy()
    (skip,) = lower(model, "contrib").skipped
    assert isinstance(skip, Skip)
    assert "GroupQueryAttention cannot express it" in skip.reason
    assert reason in skip.reason
    assert ops(model).count("Attention") == 1
    assert_same(before, model, CHUNKS_OF_BATCHES)


@pytest.mark.parametrize("operator", ["standard", "contrib"])
@pytest.mark.parametrize("name", ["padding", "window", "window and padding"])
def test_layers_share_masks_and_lengths(name: str, operator: str) -> None:
    form, options = FORMS[name]
    one, two = attention_model(form, **options), attention_model(form, **options, layers=2)
    lower(one, operator)
    lower(two, operator)
    assert len(ops(two)) == len(ops(one)) + 1


def test_a_plain_cached_attention_is_one_node() -> None:
    model = attention_model(CACHED)
    lower(model, "standard")
    assert ops(model) == ["Attention"]


def test_half_precision() -> None:
    model = attention_model(replace(CACHED, bias=True, float_softmax=True), bias=("B", 1, 1, "T"))
    for graph in model.graphs():
        for tensor in (*graph.inputs, *graph.outputs):
            tensor.dtype = np.dtype(np.float16)
    before = model.copy()
    lower(model, "standard")
    feeds = {name: np.maximum(value, -1e4).astype(np.float16) for name, value in feeds_for(before, SIZES[2]).items()}
    expected, actual = run(before, feeds)[0], run(model, feeds)[0]
    assert actual.dtype == np.float16
    # Weights and sums of values around one, each rounded to 11 bits a few times.
    np.testing.assert_allclose(actual.astype(np.float32), expected.astype(np.float32), atol=8 * 2**-11)


def test_nothing_to_do() -> None:
    model = attention_model(CACHED)
    lower(model, "standard")
    assert not lower(model, "standard")
    assert next(iter(itertools.islice(model.functions, 1)), None) is None


def test_sizes_that_no_input_has_are_read_from_the_operands() -> None:
    """An embedded encoder whose hidden states have sizes of their own."""
    model = attention_model(AttentionForm(bias=True), bias=("B", 1, 1, "T"), layers=2)
    for tensor in model.graph.inputs[:3]:
        shape = list(tensor.shape)
        shape[1] = None
        tensor.shape = shape
    before = model.copy()
    assert lower(model, "standard")
    assert_same_unnamed(before, model)


def assert_same_unnamed(before: Model, after: Model) -> None:
    for model in (before, after):
        for tensor in model.graph.inputs[:3]:
            tensor.shape = ["B", "S", tensor.shape[2]]
    assert_same(before, after, SIZES[1])


def test_padding_is_given_as_booleans() -> None:
    """Where all that a bias does is hide keys, one node less makes a mask of booleans; in the source's own terms."""
    model = attention_model(replace(CACHED, bias=True), bias=("B", 1, 1, "T"))
    (node,) = model.graph.nodes
    mask = gs.Variable("attention_mask", np.int64, ["B", "P + S"])
    op = Builder(model, "mask")
    low = np.array(np.finfo(np.float32).min, np.float32)
    bias = op.Unsqueeze(op.Where(op.Cast(mask, to=onnx.TensorProto.BOOL), np.zeros((), np.float32), low), [1, 2])
    bias.dtype = np.dtype(np.float32)
    node.inputs[-1] = bias
    model.graph.inputs[-1] = mask
    model.graph.nodes[:0] = op.nodes
    before = model.copy()
    assert lower(model, "standard")
    assert ops(model) == ["Shape", "Cast", "Unsqueeze", "Concat", "Expand", "Attention"]
    feeds = feeds_for(before, SIZES[3])
    feeds["attention_mask"] = np.ones((3, 8), np.int64)
    feeds["attention_mask"][1, :4] = 0
    for expected, actual in zip(run(before, feeds), run(model, feeds), strict=True):
        np.testing.assert_allclose(actual, expected, atol=ATOL)
