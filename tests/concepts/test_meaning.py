"""The bodies of the concepts, run by ONNX Runtime, against numpy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper

from onnxslim_llm.concepts.activation import GELU, GELU_TANH, SWISH
from onnxslim_llm.concepts.attention import AttentionForm, attention_form, call_attention, is_attention
from onnxslim_llm.concepts.concept import Concept
from onnxslim_llm.concepts.normalization import RMS_NORM
from onnxslim_llm.concepts.rotary import ROTARY, RotaryPairs
from onnxslim_llm.ir.model import Model, from_proto

Array = NDArray[Any]

#: Sums of at most a hundred products of numbers around one, in float32.
TOLERANCE = 2e-5


def _run(model: Model, feeds: dict[str, Array]) -> list[Array]:
    session = ort.InferenceSession(model.to_proto().SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, feeds)]


def _model(feeds: dict[str, Array], outputs: Sequence[str]) -> tuple[Model, list[gs.Variable], list[gs.Variable]]:
    inputs = [gs.Variable(name, value.dtype, [None] * value.ndim) for name, value in feeds.items()]
    results = [gs.Variable(name, np.dtype(np.float32)) for name in outputs]
    model = from_proto(helper.make_model(helper.make_graph([], "g", [], []), ir_version=9))
    model.set_opset("", 18)
    model.graph.inputs, model.graph.outputs = inputs, results
    return model, inputs, results


def _call(concept: Concept, feeds: dict[str, Array], attributes: dict[str, Any]) -> Array:
    model, inputs, outputs = _model(feeds, ["Y"])
    model.graph.nodes.append(concept.call(model, "node", inputs, outputs, attributes))
    return _run(model, feeds)[0]


def _normal(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def test_rms_norm() -> None:
    x, scale = _normal(2, 3, 8), _normal(8)
    expected = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * scale
    assert np.allclose(_call(RMS_NORM, {"X": x, "scale": scale}, {"epsilon": 1e-5}), expected, atol=TOLERANCE)


@pytest.mark.parametrize("alpha", [1.0, 1.702])
def test_swish(alpha: float) -> None:
    x = _normal(4, 5)
    assert np.allclose(_call(SWISH, {"X": x}, {"alpha": alpha}), x / (1 + np.exp(-alpha * x)), atol=TOLERANCE)


def test_gelu() -> None:
    from math import erf

    x = _normal(4, 5)
    expected = x / 2 * (1 + np.vectorize(erf)(x / np.sqrt(2)))
    assert np.allclose(_call(GELU, {"X": x}, {}), expected, atol=TOLERANCE)
    tanh = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    assert np.allclose(_call(GELU_TANH, {"X": x}, {}), tanh, atol=TOLERANCE)


@pytest.mark.parametrize(("pairs", "rotary_dim"), [("half", 8), ("half", 4), ("interleaved", 8), ("interleaved", 4)])
def test_rotary(pairs: RotaryPairs, rotary_dim: int) -> None:
    x, angles = _normal(2, 3, 16), _normal(2, 3, rotary_dim // 2)
    c, s = np.cos(angles)[:, :, None], np.sin(angles)[:, :, None]
    heads = x.reshape(2, 3, 2, 8)
    turned = heads[..., :rotary_dim]
    half = rotary_dim // 2
    a, b = (turned[..., :half], turned[..., half:]) if pairs == "half" else (turned[..., ::2], turned[..., 1::2])
    real, imaginary = a * c - b * s, a * s + b * c
    both = np.concatenate([real, imaginary], -1)
    if pairs == "interleaved":
        both = np.stack([real, imaginary], -1).reshape(turned.shape)
    expected = np.concatenate([both, heads[..., rotary_dim:]], -1).reshape(x.shape)
    feeds = {"X": x, "cosines": np.cos(angles), "sines": np.sin(angles)}
    got = _call(ROTARY[pairs], feeds, {"num_heads": 2, "rotary_dim": rotary_dim})
    assert np.allclose(got, expected, atol=TOLERANCE)


def _attend(feeds: dict[str, Array], form: AttentionForm, heads: tuple[int, int], softcap: float, window: int) -> Any:
    hq, hk = heads

    def by_head(x: Array, h: int) -> Array:
        return x if form.heads_major else x.reshape(*x.shape[:2], h, -1).transpose(0, 2, 1, 3)

    q, k, v = by_head(feeds["Q"], hq), by_head(feeds["K"], hk), by_head(feeds["V"], hk)
    if form.past:
        k = np.concatenate([feeds["past_key"], k], 2)
        v = np.concatenate([feeds["past_value"], v], 2)
    scores = q @ np.repeat(k, hq // hk, 1).swapaxes(2, 3) * 0.3
    if form.softcap:
        scores = softcap * np.tanh(scores / softcap)
    if form.bias:
        scores = scores + feeds["bias"]
    size, total = scores.shape[-2:]
    row, column = np.arange(size)[:, None] + total - size, np.arange(total)
    if form.causal:
        scores = np.where(column <= row, scores, -np.inf)
    if form.window:
        scores = np.where(column > row - window, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = weights / weights.sum(-1, keepdims=True) @ np.repeat(v, hq // hk, 1)
    if not form.heads_major:
        y = y.transpose(0, 2, 1, 3).reshape(*y.shape[:1], size, -1)
    return [y, k, v] if form.present else [y]


FORMS = [
    AttentionForm(*flags)
    for flags in itertools.product([False, True], repeat=8)
    if not (flags[5] and not flags[4])  # a window is asked for with the causal mask only
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_attention(form: AttentionForm) -> None:
    batch, size, past, hq, dim, softcap, window = 2, 3, 4, 4, 8, 2.0, 2
    hk = 2 if form.grouped else hq
    shapes = {"Q": (hq, dim), "K": (hk, dim), "V": (hk, 6)}
    feeds = {
        name: _normal(batch, h, size, d) if form.heads_major else _normal(batch, size, h * d)
        for name, (h, d) in shapes.items()
    }
    if form.past:
        feeds |= {"past_key": _normal(batch, hk, past, dim), "past_value": _normal(batch, hk, past, 6)}
    if form.bias:
        feeds["bias"] = _normal(batch, 1, size, size + past * form.past)
    model, inputs, outputs = _model(feeds, form.outputs)
    node = call_attention(
        model,
        "node",
        form,
        inputs,
        outputs,
        q_num_heads=hq,
        kv_num_heads=hk,
        scale=0.3,
        softcap=softcap * form.softcap,
        window=window * form.window,
    )
    assert is_attention(node)
    assert attention_form(node) == form
    model.graph.nodes.append(node)
    for got, expected in zip(_run(model, feeds), _attend(feeds, form, (hq, hk), softcap, window), strict=True):
        assert got.shape == expected.shape
        assert np.allclose(got, expected, atol=TOLERANCE)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("zero_rows", [False, True])
def test_a_row_that_sees_nothing(zero_rows: bool, causal: bool) -> None:
    form = AttentionForm(bias=True, causal=causal, zero_rows=zero_rows)
    feeds = {"Q": _normal(1, 2, 8), "K": _normal(1, 2, 8), "V": _normal(1, 2, 8), "bias": np.zeros((2, 2), np.float32)}
    feeds["bias"][0] = -np.inf
    model, inputs, outputs = _model(feeds, form.outputs)
    attributes = {"q_num_heads": 2, "kv_num_heads": 2, "scale": 0.3}
    node = call_attention(model, "node", form, inputs, outputs, **attributes)
    assert attention_form(node) == form
    model.graph.nodes.append(node)
    result = _run(model, feeds)[0]
    assert np.all(np.isfinite(result[:, 1]))
    if zero_rows:
        assert not result[:, 0].any()
    elif not causal:
        assert np.all(np.isnan(result[:, 0]))


def test_softmax_in_float32() -> None:
    form = AttentionForm(float_softmax=True)
    feeds = {name: _normal(1, 3, 8).astype(np.float16) for name in "QKV"}
    model, inputs, _ = _model(feeds, ())
    output = gs.Variable("Y", np.dtype(np.float16))
    model.graph.outputs = [output]
    node = call_attention(model, "node", form, inputs, [output], q_num_heads=2, kv_num_heads=2, scale=0.3)
    assert attention_form(node) == form
    model.graph.nodes.append(node)
    wide = {name: value.astype(np.float32) for name, value in feeds.items()}
    expected = _attend(wide, AttentionForm(), (2, 2), 0.0, 0)[0]
    # Sums of eight products, rounded to the 11 bits of float16 three times.
    assert np.allclose(_run(model, feeds)[0], expected, atol=4 * 2.0**-10)
