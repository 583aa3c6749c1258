# ruff: noqa: E501 (one graph a line)
from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import pytest
from block_models import model_of
from concept_models import Array, assert_same_results, call_model, lower
from fusion_checks import floats, proto

from onnxslim_llm.concepts.activation import GELU, GELU_TANH, SWISH
from onnxslim_llm.concepts.normalization import RMS_NORM
from onnxslim_llm.ir.model import Model, from_proto
from onnxslim_llm.passes.lower.operators.lower_contrib_ops import LowerContribOps
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import Pipeline

#: Float32 sums of a dozen terms around one, in another order. ONNX Runtime's skip norms take other roots, too.
TOLERANCE = 4e-6
HEAD = "agraph (float[b, s, 8] x, float[b, s, 8] r) => (float[b, s, 8] y)"
WEIGHTS: dict[str, Array] = {"w": floats(8, seed=1), "c": floats(8, seed=2), "k": floats(8, seed=3)}
FEEDS = {"x": floats(2, 3, 8), "r": floats(2, 3, 8, seed=4)}
RMS = "q = Pow ({0}, two)  m = ReduceMean <keepdims = 1> (q, last)  a = Add (m, eps)  t = Sqrt (a)  n = Div ({0}, t)  {1} = Mul (n, w)"
LAYER = "{1} = LayerNormalization ({0}, w, c)"


def source(body: str, head: str = HEAD, opset: int = 21, **weights: Array) -> onnx.ModelProto:
    small = {
        "two": np.array(2, np.float32),
        "last": np.array([-1]),
        "eps": np.array(1e-5, np.float32),
        "third": np.array(3, np.float32),
    }
    known = {**small, **WEIGHTS, **weights}
    text = f"{head} {{ {body} }}"
    return proto(text, opset, **{name: value for name, value in known.items() if re.search(rf"[(,] ?{name}[,)]", text)})


def lowered(
    text: onnx.ModelProto, skip: str = "rms", feeds: dict[str, Array] | None = None
) -> tuple[Model, dict[str, int]]:
    """Fuse, lower, compare; return the model and its operators."""
    model = model_of(text)
    steps = f'fuse_rms_norm, fuse_activations, lower_contrib_ops{{skip_norms="{skip}"}}'
    ops, _ = lower(model, steps, "ort-cpu")
    assert_same_results(model_of(text), model, FEEDS if feeds is None else feeds, TOLERANCE)
    return model, dict(ops)


def test_the_model_gets_opset_24_and_standard_norms() -> None:
    feeds = {"X": floats(2, 3, 8), "scale": floats(8, seed=1)}
    model = call_model(RMS_NORM, feeds, {"epsilon": 1e-6}, {"X": ["b", "s", 8], "scale": [8]})
    before = model.copy()
    ops, _ = lower(model, "lower_contrib_ops", "ort-cpu")
    assert ops == {"RMSNormalization": 1}
    assert model.opset() == 24
    assert model.opset("com.microsoft") is None
    assert_same_results(before, model, feeds, TOLERANCE)


def test_an_older_opset_if_it_is_wanted() -> None:
    feeds = {"X": floats(2, 3, 8), "scale": floats(8, seed=1)}
    model = call_model(RMS_NORM, feeds, {"epsilon": 1e-6}, {"X": ["b", "s", 8], "scale": [8]})
    ops, record = lower(model, "lower_contrib_ops{opset=21}, cleanup", "ort-cpu")
    assert ops["RMSNormalization"] == 0
    assert model.opset() == 21
    assert record.detail["inlined"] == {"RMSNorm": 1}


@pytest.mark.parametrize("alpha", [1.0, 1.702])
def test_swish_becomes_quick_gelu(alpha: float) -> None:
    feeds = {"X": floats(2, 3, 8)}
    model = call_model(SWISH, feeds, {"alpha": alpha}, {"X": ["b", "s", 8]})
    before = model.copy()
    ops, _ = lower(model, "lower_contrib_ops", "ort-cpu")
    assert ops == {"QuickGelu": 1}
    assert_same_results(before, model, feeds, TOLERANCE)


@pytest.mark.parametrize(("concept", "biased"), [(GELU, "BiasGelu"), (GELU_TANH, "FastGelu")])
@pytest.mark.parametrize("order", ["h = Add (x, c)", "h = Add (c, x)"])
def test_a_bias_goes_into_the_activation(concept: Any, biased: str, order: str) -> None:
    approximate = ' <approximate = "tanh">' if concept is GELU_TANH else ""
    _, ops = lowered(source(f"{order}  g = Gelu{approximate} (h)  y = Add (g, r)"))
    assert ops == {biased: 1, "Add": 1}


@pytest.mark.parametrize(
    "body", ["h = Add (x, r)  y = Gelu (h)", "h = Add (x, c)  g = Gelu (h)  p = Mul (g, r)  y = Sub (p, h)"]
)
def test_other_sums_stay(body: str) -> None:
    _, ops = lowered(source(body))
    assert ops["Gelu"] == 1
    assert ops["Add"] == 1


def test_a_bias_that_is_an_output_stays() -> None:
    head = HEAD.replace("(float[b, s, 8] y)", "(float[b, s, 8] y, float[b, s, 8] h)")
    _, ops = lowered(source("h = Add (x, c)  g = Gelu (h)  y = Add (g, r)", head))
    assert ops == {"Gelu": 1, "Add": 2}


def test_a_residual_sum_goes_into_the_norm() -> None:
    _, ops = lowered(source(f"h = Add (x, r)  {RMS.format('h', 'y')}"))
    assert ops == {"SkipSimplifiedLayerNormalization": 1}


def test_a_sum_that_is_used_elsewhere_stays_available_under_its_name() -> None:
    model, ops = lowered(source(f"h = Add (x, r)  {RMS.format('h', 'z')}  y = Add (z, h)"))
    assert ops == {"SkipSimplifiedLayerNormalization": 1, "Add": 1}
    norm = model.graph.nodes[0]
    assert [tensor.name for tensor in norm.outputs] == ["z", "", "", "h"]


def test_a_sum_that_is_an_output() -> None:
    head = HEAD.replace("(float[b, s, 8] y)", "(float[b, s, 8] y, float[b, s, 8] h)")
    _, ops = lowered(source(f"h = Add (x, r)  {RMS.format('h', 'y')}", head))
    assert ops == {"SkipSimplifiedLayerNormalization": 1}


def test_a_sum_that_is_used_before_the_norm() -> None:
    body = f"h = Add (x, r)  e = Neg (h)  {RMS.format('h', 'z')}  y = Add (z, e)"
    _, ops = lowered(source(body))
    assert ops == {"Neg": 1, "SkipSimplifiedLayerNormalization": 1, "Add": 1}


@pytest.mark.parametrize("order", ["i = Add (x, k)  h = Add (i, r)", "i = Add (k, x)  h = Add (r, i)"])
@pytest.mark.parametrize("norm", [RMS, LAYER, "{1} = LayerNormalization ({0}, w)"])
def test_a_bias_of_a_summand_goes_into_the_norm(order: str, norm: str) -> None:
    _, ops = lowered(source(f"{order}  {norm.format('h', 'y')}"), "all")
    assert ops == {"SkipSimplifiedLayerNormalization" if norm is RMS else "SkipLayerNormalization": 1}


def test_two_norms_of_one_sum() -> None:
    body = f"h = Add (x, r)  {RMS.format('h', 'f')}  g = LayerNormalization (h, w, c)  y = Add (f, g)"
    _, ops = lowered(source(body), "all")
    assert ops == {"SkipSimplifiedLayerNormalization": 1, "LayerNormalization": 1, "Add": 1}


def test_layer_norms_only_if_wanted() -> None:
    body = f"h = Add (x, r)  {LAYER.format('h', 'z')}  {RMS.format('r', 'u')}  y = Add (u, z)"
    assert lowered(source(body))[1] == {"Add": 2, "LayerNormalization": 1, "RMSNormalization": 1}
    assert lowered(source(body), "all")[1] == {"Add": 1, "SkipLayerNormalization": 1, "RMSNormalization": 1}
    assert lowered(source(f"h = Add (x, r)  {RMS.format('h', 'y')}"), "none")[1] == {"Add": 1, "RMSNormalization": 1}


#: Sums that the operators do not take: (what, body, head).
OTHER_SUMS = [
    ("broadcast", f"h = Add (x, v)  {RMS.format('h', 'y')}", "agraph (float[b, s, 8] x, float[1, s, 8] v, float[b, s, 8] r) => (float[b, s, 8] y)"),
    ("a vector", f"h = Add (x, c)  {RMS.format('h', 'y')}", HEAD),
    ("no sum", f"h = Sub (x, r)  {RMS.format('h', 'y')}", HEAD),
    ("four axes", f"h = Add (x, r)  {RMS.format('h', 'y')}", HEAD.replace("s, 8", "s, 3, 8")),
    ("sizes unknown", f"h = Add (x, r)  {RMS.format('h', 'y')}", HEAD.replace("b, s, 8", "?, s, 8")),
    ("two axes normalised", "h = Add (x, r)  y = LayerNormalization <axis = 1> (h, v)", HEAD.replace("s, 8", "3, 8")),
]  # fmt: skip


@pytest.mark.parametrize(("body", "head"), [case[1:] for case in OTHER_SUMS], ids=[case[0] for case in OTHER_SUMS])
def test_sums_that_stay(body: str, head: str) -> None:
    weights = {"v": floats(3, 8)} if "float[1, s, 8] v" not in head else {}
    text = source(body, head, **weights)
    dims = {"b": 2, "s": 3, "": 2}
    feeds = {
        value.name: floats(*(d.dim_value or dims[d.dim_param] for d in value.type.tensor_type.shape.dim), seed=i)
        for i, value in enumerate(text.graph.input)
    }
    _, ops = lowered(text, "all", feeds)
    assert not any(name.startswith("Skip") for name in ops)


def test_a_model_that_cannot_be_converted_gets_primitive_operators() -> None:
    # GroupNormalization of opset 18 has another meaning than later ones.
    model = from_proto(
        onnx.parser.parse_model(
            """<ir_version: 8, opset_import: ["" : 18]>
            agraph (float[b, 4, 8] x, float[2] g, float[2] c) => (float[b, 4, 8] y)
            { s = Sigmoid (x)  z = Mul (x, s)  y = GroupNormalization <num_groups = 2> (z, g, c) }"""
        )
    )
    records = Pipeline('fuse_activations, lower_contrib_ops{skip_norms="all"}').run(model, Context())
    assert model.opset() == 18
    assert "the model stays at opset 18" in "; ".join(skip.reason for skip in records[1].skipped)
    assert [node.op for node in model.graph.nodes] == ["QuickGelu", "GroupNormalization"]


def test_nothing_to_lower() -> None:
    model = model_of(source("y = Add (x, r)", opset=18))
    assert not LowerContribOps().apply(model, Context())
    assert model.opset() == 18
