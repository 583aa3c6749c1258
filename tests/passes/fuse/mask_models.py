"""Attentions with a computed mask, and the comparison before and after their masks are simplified."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
from onnx import parser

from onnxslim_llm.concepts.attention import AttentionForm, attention_form, call_attention, is_attention
from onnxslim_llm.ir.model import Model, from_proto
from onnxslim_llm.rewrite.passes import Change
from onnxslim_llm.rewrite.pipeline import Pipeline

HEADS, WIDTH = 2, 4
#: Both sides compute the same sums in float32, over the same keys with the same weights.
ATOL = 1e-6

CACHE = f"""float[B, S, {HEADS * WIDTH}] q, float[B, S, {HEADS * WIDTH}] k, float[B, S, {HEADS * WIDTH}] v,
    float[B, {HEADS}, P, {WIDTH}] past_key, float[B, {HEADS}, P, {WIDTH}] past_value"""
NO_CACHE = f"float[B, S, {HEADS * WIDTH}] q, float[B, S, {HEADS * WIDTH}] k, float[B, S, {HEADS * WIDTH}] v"
CROSS = f"float[B, S, {HEADS * WIDTH}] q, float[B, E, {HEADS * WIDTH}] k, float[B, E, {HEADS * WIDTH}] v"

CONSTANTS = """<int64 i0 = {0}, int64 i1 = {1}, int64[1] v0 = {0}, int64[1] v1 = {1}, int64[1] v2 = {2},
    int64[2] v12 = {1, 2}, int64[2] v01 = {0, 1}, int64[1] last = {-1},
    float f0 = {0.0}, float f1 = {1.0}, float low = {-3.4028234663852886e38}>"""

#: Positions of queries and keys; [1, 1, S, 1] and [1, 1, 1, T].
RANGES = """
    past_shape = Shape <start = 2, end = 3> (past_key)
    p = Squeeze (past_shape)
    q_shape = Shape <start = 1, end = 2> (q)
    s = Squeeze (q_shape)
    t = Add (p, s)
    row_1d = Range (p, t, i1)
    column = Range (i0, t, i1)
    row = Unsqueeze (row_1d, last)
"""
#: The same without a cache.
SHORT_RANGES = """
    q_shape = Shape <start = 1, end = 2> (q)
    s = Squeeze (q_shape)
    column = Range (i0, s, i1)
    row = Unsqueeze (column, last)
"""
CAUSAL = "causal = LessOrEqual (column, row)"
PADDING = """
    padding_2d = Cast <to = 9> (attention_mask)
    padding = Unsqueeze (padding_2d, v12)
"""


def attention_model(
    inputs: str, nodes: str, mask: str = "int64[B, T] attention_mask", constants: str = "", **form: Any
) -> Model:
    """A model of one attention whose bias is the tensor `bias` that `nodes` compute.

    Args:
        inputs: `CACHE`, `NO_CACHE` or `CROSS`.
        nodes: ONNX text.
        mask: Further inputs; the tensors of `inputs` are there anyhow.
        constants: Further initializers, in ONNX text.
        form: Flags of the attention's form; `window_size` for the number.
    """
    declared = ", ".join(part for part in (inputs, mask) if part)
    initializers = CONSTANTS[:-1] + (", " + constants if constants else "") + ">"
    text = f"agraph ({declared}) => (float[b0, b1, b2, b3] bias) {initializers} {{ {nodes} }}"
    proto = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]>\n{text}')
    model = from_proto(proto)
    tensors = {t.name: t for t in (*model.graph.inputs, *model.graph.outputs)}
    size = form.pop("window_size", 0)
    shape = AttentionForm(past="past_key" in tensors, bias=True, window=bool(size), **form)
    output = gs.Variable("y", np.float32, ["B", "S", HEADS * WIDTH])
    node = call_attention(
        model,
        "attention",
        shape,
        [tensors["bias" if name == "bias" else name.lower()] for name in shape.inputs],
        [output],
        q_num_heads=HEADS,
        kv_num_heads=HEADS,
        scale=0.5,
        window=size,
    )
    model.graph.nodes.append(node)
    model.graph.outputs = [output]
    return model


def simplify(model: Model) -> Change:
    """Apply the pass, check that the model is valid and that a second time finds nothing."""
    change = _run(model)
    onnx.checker.check_model(model.to_proto(), full_check=True)
    assert not _run(model)
    return change


def _run(model: Model) -> Change:
    (record,) = Pipeline("simplify_masks").run(model)
    return Change([str(site) for site in range(record.changed)], list(record.skipped))


def form_of(model: Model) -> tuple[AttentionForm, gs.Node]:
    (node,) = [node for node in model.graph.nodes if is_attention(node)]
    return attention_form(node), node


def flags(model: Model) -> AttentionForm:
    """The form without what never changes."""
    return replace(form_of(model)[0], past=False, zero_rows=False)


def session(model: Model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.to_proto().SerializeToString(), options, ["CPUExecutionProvider"])


def feeds_for(model: Model, sizes: dict[str, int], padding: np.ndarray | None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    feeds = {}
    for tensor in model.graph.inputs:
        shape = [sizes[d] if isinstance(d, str) else d for d in tensor.shape]
        if np.dtype(tensor.dtype).kind == "f":
            feeds[tensor.name] = rng.normal(size=shape).astype(np.float32)
        else:
            assert padding is not None
            feeds[tensor.name] = padding.astype(tensor.dtype)
    return feeds


def cases(past: bool, cross: bool = False) -> Iterator[tuple[dict[str, int], np.ndarray]]:
    """Sizes, and padding masks [B, T] of all kinds: none, left, right, holes."""
    rng = np.random.default_rng(11)
    for batch, queries, before in itertools.product((1, 3), (1, 4, 9), (0, 5) if past else (0,)):
        keys = 6 if cross else before + queries
        sizes = {"B": batch, "S": queries, "P": before, "T": keys, "E": keys}
        yield sizes, np.ones((batch, keys), np.int64)
        columns = np.arange(keys)[None, :]
        lengths = rng.integers(1, keys + 1, batch)[:, None]
        yield sizes, (columns >= keys - lengths).astype(np.int64)
        yield sizes, (columns < lengths).astype(np.int64)
        yield sizes, rng.integers(0, 2, (batch, keys))


def assert_equal_rows(
    before: Model, after: Model, past: bool = True, cross: bool = False, every: bool = False, window: int = 1000
) -> None:
    """Compare outputs; a row whose own token is padding may differ if it sees no key, unless `every` is set."""
    left, right = session(before), session(after)
    for sizes, padding in cases(past, cross):
        feeds = feeds_for(before, sizes, padding)
        kept = {t.name for t in after.graph.inputs}
        expected = left.run(None, feeds)[0]
        actual = right.run(None, {name: value for name, value in feeds.items() if name in kept})[0]
        assert np.all(np.isfinite(actual))
        own = padding[:, sizes["T"] - sizes["S"] :] if not cross else np.ones((sizes["B"], sizes["S"]))
        rows = np.ones_like(own, dtype=bool) if every else _sees_something(padding, sizes, window) | (own != 0)
        np.testing.assert_allclose(actual[rows], expected[rows], atol=ATOL)


def _sees_something(padding: np.ndarray, sizes: dict[str, int], window: int) -> np.ndarray:
    places = range(sizes["T"] - sizes["S"], sizes["T"])
    return np.stack([padding[:, max(0, p - window + 1) : p + 1].any(axis=1) for p in places], axis=1)
