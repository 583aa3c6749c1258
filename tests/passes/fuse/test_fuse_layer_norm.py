# ruff: noqa: E501 (one graph a line)
from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from fusion_checks import Array, Fused, floats, fuse, proto

from onnxslim_llm.passes.fuse.fuse_layer_norm import FuseLayerNorm

WIDTH = 8
CONSTANTS: dict[str, Array] = {
    "two": np.array(2.0, np.float32),
    "one": np.array(1.0, np.float32),
    "half": np.array(0.5, np.float32),
    "minus_half": np.array(-0.5, np.float32),
    "eps": np.array(1e-5, np.float32),
    "last": np.array([-1]),
    "w": floats(WIDTH, seed=1),
    "c": floats(WIDTH, seed=2),
}
HEAD = "agraph (float[b, s, 8] x) => (float[b, s, 8] y)"
#: ONNX Runtime takes the variance as mean(x^2) - mean(x)^2; with means and deviations around one that costs two bits.
TOLERANCE = 1e-5

CENTRE = "u = ReduceMean <keepdims = 1> (x, last)  d = Sub (x, u)"
SQUARE = "q = Pow (d, two)"
VARIANCE = "m = ReduceMean <keepdims = 1> (q, last)"
SHIFT = "a = Add (m, eps)"
UNIT = "r = Sqrt (a)  n = Div (d, r)"
AFFINE = "p = Mul (n, w)  y = Add (p, c)"


def model(body: str, head: str = HEAD, opset: int = 18, **constants: Array) -> onnx.ModelProto:
    known = {**CONSTANTS, **constants}
    return proto(f"{head} {{ {body} }}", opset, **{name: value for name, value in known.items() if name in body})


def norm(
    centre: str = CENTRE,
    square: str = SQUARE,
    variance: str = VARIANCE,
    shift: str = SHIFT,
    unit: str = UNIT,
    affine: str = AFFINE,
) -> str:
    return "  ".join([centre, square, variance, shift, unit, affine])


def fused(source: onnx.ModelProto, x: Array | None = None, tolerance: float = TOLERANCE) -> Fused:
    return fuse(FuseLayerNorm(), source, {"x": floats(2, 3, WIDTH) if x is None else x}, tolerance)


@pytest.mark.parametrize("square", ["q = Pow (d, two)", "q = Mul (d, d)"])
@pytest.mark.parametrize(
    "unit",
    [
        "r = Sqrt (a)  n = Div (d, r)",
        "r = Pow (a, half)  n = Div (d, r)",
        "r = Sqrt (a)  i = Reciprocal (r)  n = Mul (i, d)",
        "r = Sqrt (a)  i = Div (one, r)  n = Mul (d, i)",
        "i = Pow (a, minus_half)  n = Mul (d, i)",
    ],
)
def test_spellings(square: str, unit: str) -> None:
    result = fused(model(norm(square=square, unit=unit)))
    assert result.ops == {"LayerNormalization": 1}
    assert result.sites == 1


def test_the_difference_computed_twice() -> None:
    body = norm(unit="u2 = ReduceMean <keepdims = 1> (x, last)  d2 = Sub (x, u2)  r = Sqrt (a)  n = Div (d2, r)")
    assert fused(model(body)).ops == {"LayerNormalization": 1}


def test_weight_and_bias_first() -> None:
    assert fused(model(norm(affine="p = Mul (w, n)  y = Add (c, p)"))).ops == {"LayerNormalization": 1}


@pytest.mark.parametrize("affine", ["y = Mul (n, w)", "y = Add (n, c)", "y = Identity (n)"])
def test_without_bias_or_weight(affine: str) -> None:
    assert fused(model(norm(affine=affine))).ops["LayerNormalization"] == 1


def test_axes_as_an_attribute_are_converted_to_a_newer_opset() -> None:
    centre = CENTRE.replace("keepdims = 1> (x, last)", "axes = [-1]> (x)")
    variance = VARIANCE.replace("keepdims = 1> (q, last)", "axes = [2]> (q)")
    result = fused(model(norm(centre, variance=variance), opset=13))
    assert result.ops["LayerNormalization"] == 1
    assert result.model.opset() == 18


def test_a_bias_after_the_operator() -> None:
    result = fused(model("n = LayerNormalization <epsilon = 0.01> (x, w)  y = Add (n, c)"))
    assert result.ops == {"LayerNormalization": 1}


HALF_HEAD = "agraph (float16[b, s, 8] x) => (float16[b, s, 8] y)"
HALF_CENTRE = "h = Cast <to = 1> (x)  u = ReduceMean <keepdims = 1> (h, last)  d = Sub (h, u)"
#: One unit in the last place of float16 numbers below 4: the float32 norms differ in some last bits, see TOLERANCE.
HALF_TOLERANCE = 2**-9


def test_casts_around_the_unit_go_into_the_norm() -> None:
    constants = {name: CONSTANTS[name].astype(np.float16) for name in ("w", "c")}
    body = norm(HALF_CENTRE, affine="k = Cast <to = 10> (n)  p = Mul (k, w)  y = Add (p, c)")
    result = fused(model(body, HALF_HEAD, **constants), floats(2, 3, WIDTH, dtype=np.float16), HALF_TOLERANCE)
    assert result.ops == {"LayerNormalization": 1}


def test_a_weight_that_is_multiplied_in_float32_keeps_the_casts() -> None:
    body = norm(HALF_CENTRE, affine="p = Mul (n, w)  k = Add (p, c)  y = Cast <to = 10> (k)")
    result = fused(model(body, HALF_HEAD), floats(2, 3, WIDTH, dtype=np.float16), HALF_TOLERANCE)
    assert result.ops == {"Cast": 2, "LayerNormalization": 1}


NEAR_MISSES = [
    ("no epsilon", norm(shift="a = Identity (m)"), "expected Add, found Identity"),
    ("pow by 3", norm(square="q = Pow (d, three)"), "expected the constant 2.0"),
    ("variance of x", norm(square="q = Mul (x, x)"), "expected Sub"),
    ("difference of squares", f"{CENTRE}  e = Mul (x, x)  f = ReduceMean <keepdims = 1> (e, last)  g = Mul (u, u)  m = Sub (f, g)  {SHIFT}  {UNIT}  {AFFINE}", "expected ReduceMean, found Sub"),
    ("wrong axis of the mean", norm(centre=CENTRE.replace("last", "first")), "ReduceMean.axes is [1]"),
    ("wrong axis of the variance", norm(variance=VARIANCE.replace("last", "first")), "ReduceMean.axes is [1]"),
    ("two axes", norm(CENTRE.replace("last", "both"), variance=VARIANCE.replace("last", "both")), "ReduceMean.axes is [1, 2]"),
    ("the other way round", norm(centre=CENTRE.replace("Sub (x, u)", "Sub (u, x)")), "expected ReduceMean, found a graph input"),
    ("epsilon outside", norm(shift="k = Sqrt (m)  a = Add (k, eps)", unit="n = Div (d, a)"), "expected"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "reason"), [case[1:] for case in NEAR_MISSES], ids=[case[0] for case in NEAR_MISSES])
def test_near_misses(body: str, reason: str) -> None:
    more = {"three": np.array(3.0, np.float32), "first": np.array([1]), "both": np.array([1, 2])}
    result = fused(model(body, **more), abs(floats(2, 3, WIDTH)) + 1)
    assert result.ops["LayerNormalization"] == 0
    assert reason in result.reasons


@pytest.mark.parametrize(("tensor", "shape"), [("r", "b, s, 1"), ("d", "b, s, 8")])
def test_an_inner_tensor_that_is_an_output(tensor: str, shape: str) -> None:
    result = fused(model(norm(), f"agraph (float[b, s, 8] x) => (float[b, s, 8] y, float[{shape}] {tensor})"))
    assert result.ops["LayerNormalization"] == 0
    assert "an inner tensor is also a graph output" in result.reasons


def test_weight_and_bias_of_other_shapes_stay_nodes() -> None:
    result = fused(model(norm(), w=floats(3, 1)))
    assert result.ops == {"LayerNormalization": 1, "Mul": 1, "Add": 1}
    assert "the weight has shape [3, 1], expected [8]" in result.reasons
    result = fused(model(norm(), c=floats(3, 1)))
    assert result.ops == {"LayerNormalization": 1, "Add": 1}
    assert "the bias has shape [3, 1], expected [8]" in result.reasons


@pytest.mark.parametrize(("name", "dtype"), [("float16", np.float16), ("double", np.float64)])
def test_a_mean_in_another_type_is_refused(name: str, dtype: Any) -> None:
    constants = {key: CONSTANTS[key].astype(dtype) for key in ("two", "eps", "w", "c")}
    result = fused(model(norm(), HEAD.replace("float", name), **constants), floats(2, 3, WIDTH, dtype=dtype))
    assert result.ops["LayerNormalization"] == 0
    assert f"the mean is taken in {name}" in result.reasons


def test_an_rms_norm_is_left_to_its_own_pass() -> None:
    result = fused(
        model(
            "q = Pow (x, two)  m = ReduceMean (q, last)  a = Add (m, eps)  r = Sqrt (a)  n = Div (x, r)  y = Mul (n, w)"
        )
    )
    assert result.ops["LayerNormalization"] == 0
