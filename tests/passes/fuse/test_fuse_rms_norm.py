# ruff: noqa: E501 (one graph a line)
from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from fusion_checks import Array, Fused, floats, fuse, proto

from onnxslim_llm.concepts.concept import calls
from onnxslim_llm.concepts.normalization import RMS_NORM
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.passes.fuse.fuse_rms_norm import FuseRmsNorm

WIDTH = 8
CONSTANTS: dict[str, Array] = {
    "two": np.array(2.0, np.float32),
    "one": np.array(1.0, np.float32),
    "half": np.array(0.5, np.float32),
    "minus_half": np.array(-0.5, np.float32),
    "eps": np.array(1e-5, np.float32),
    "last": np.array([-1]),
    "w": floats(WIDTH, seed=1),
}
HEAD = "agraph (float[b, s, 8] x) => (float[b, s, 8] y)"

#: The parts of a norm, in the spellings of exporters; each ends in the name that the next one reads.
SQUARES = {"pow": "q = Pow (x, two)", "product": "q = Mul (x, x)"}
INVERSES = {
    "reciprocal": "r = Sqrt (a)  i = Reciprocal (r)",
    "one over": "r = Sqrt (a)  i = Div (one, r)",
    "minus half": "i = Pow (a, minus_half)",
    "power and reciprocal": "r = Pow (a, half)  i = Reciprocal (r)",
}


def model(body: str, head: str = HEAD, opset: int = 18, **constants: Array) -> onnx.ModelProto:
    known = {**CONSTANTS, **constants}
    return proto(f"{head} {{ {body} }}", opset, **{name: value for name, value in known.items() if name in body})


def norm(
    square: str = SQUARES["pow"],
    mean: str = "m = ReduceMean <keepdims = 1> (q, last)",
    shift: str = "a = Add (m, eps)",
    unit: str = "r = Sqrt (a)  n = Div (x, r)",
    weight: str = "y = Mul (n, w)",
) -> str:
    return f"{square}  {mean}  {shift}  {unit}  {weight}"


def fused(source: onnx.ModelProto, x: Array | None = None, **options: Any) -> Fused:
    return fuse(FuseRmsNorm(), source, {"x": floats(2, 3, WIDTH) if x is None else x}, **options)


def epsilons(result: Fused) -> list[float]:
    return [float(node.attrs["epsilon"]) for _, node in calls(result.model, RMS_NORM)]


@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("order", ["n = Mul (x, i)  y = Mul (w, n)", "n = Mul (i, x)  y = Mul (n, w)"])
def test_products_with_the_inverse_root(square: str, inverse: str, order: str) -> None:
    result = fused(model(norm(SQUARES[square], unit=INVERSES[inverse], weight=order)))
    assert result.ops == {"RMSNorm": 1}
    assert result.sites == 1
    assert epsilons(result) == [pytest.approx(1e-5)]


@pytest.mark.parametrize("root", ["r = Sqrt (a)", "r = Pow (a, half)"])
def test_quotients(root: str) -> None:
    assert fused(model(norm(unit=f"{root}  n = Div (x, r)"))).ops == {"RMSNorm": 1}


@pytest.mark.parametrize("axes", ["[-1]", "[2]"])
def test_axes_as_an_attribute_are_converted_to_a_newer_opset(axes: str) -> None:
    result = fused(model(norm(mean=f"m = ReduceMean <axes = {axes}> (q)"), opset=13))
    assert result.ops["RMSNorm"] == 1
    assert result.model.opset() == 18


def test_a_model_without_norms_keeps_its_opset() -> None:
    result = fused(model("y = Mul (x, w)", opset=13))
    assert result.sites == 0
    assert result.model.opset() == 13


def test_constants_in_nodes() -> None:
    body = norm(shift="e = Constant <value_float = 0.00001> ()  a = Add (e, m)")
    assert fused(model(body)).ops["RMSNorm"] == 1


def test_without_a_weight_it_gets_ones() -> None:
    result = fused(model(norm(unit="r = Sqrt (a)", weight="y = Div (x, r)")))
    assert result.ops == {"RMSNorm": 1}
    (_, node), *_ = calls(result.model, RMS_NORM)
    assert np.array_equal(weight_of(node.inputs[1]).load(), np.ones(WIDTH, np.float32))


def test_one_plus_weight_is_stored_once() -> None:
    body = norm(weight="g = Add (w, one)  y = Mul (n, g)")
    result = fuse("cleanup, fuse_rms_norm", model(body), {"x": floats(2, 3, WIDTH)})
    assert result.ops == {"RMSNorm": 1}
    assert result.model.weight_bytes() == WIDTH * 4


def test_one_plus_weight_that_is_not_folded() -> None:
    result = fused(model(norm(weight="g = Add (w, one)  h = Identity (g)  y = Mul (n, h)")))
    assert result.ops == {"RMSNorm": 1, "Add": 1, "Identity": 1, "Mul": 1}  # the norm gets ones


def test_per_head() -> None:
    head = "agraph (float[b, h, s, 8] x) => (float[b, h, s, 8] y)"
    result = fused(
        model(norm(mean="m = ReduceMean <keepdims = 1> (q, axis)"), head, axis=np.array([3])), floats(2, 3, 4, 8)
    )
    assert result.ops == {"RMSNorm": 1}


def test_a_weight_with_leading_ones_stays_the_same_bytes() -> None:
    result = fused(model(norm(), w=floats(1, 1, WIDTH)))
    assert result.ops == {"RMSNorm": 1}
    assert result.model.weight_bytes() == WIDTH * 4


HALF_HEAD = "agraph (float16[b, s, 8] x) => (float16[b, s, 8] y)"
HALF_UNIT = (
    "c = Cast <to = 1> (x)  q = Pow (c, two)  m = ReduceMean <keepdims = 1> (q, last)  a = Add (m, eps)  "
    "r = Sqrt (a)  i = Reciprocal (r)  n = Mul (c, i)"
)


def test_casts_around_the_unit_go_into_the_norm_bit_for_bit() -> None:
    w = floats(WIDTH, seed=1, dtype=np.float16)
    source = model(f"{HALF_UNIT}  h = Cast <to = 10> (n)  y = Mul (w, h)", HALF_HEAD, w=w)
    assert fused(source, floats(2, 3, WIDTH, dtype=np.float16), tolerance=0.0).ops == {"RMSNorm": 1}


def test_a_weight_that_is_multiplied_in_float32_keeps_the_casts_bit_for_bit() -> None:
    source = model(f"{HALF_UNIT}  p = Mul (n, w)  y = Cast <to = 10> (p)", HALF_HEAD)
    result = fused(source, floats(2, 3, WIDTH, dtype=np.float16), tolerance=0.0)
    assert result.ops == {"Cast": 2, "RMSNorm": 1}
    assert "the weight is multiplied in float32, before the cast" in result.reasons


def test_a_cast_to_another_type_than_the_input_stays() -> None:
    head = "agraph (float16[b, s, 8] x) => (double[b, s, 8] y)"
    result = fused(model(f"{HALF_UNIT}  y = Cast <to = 11> (n)", head), floats(2, 3, WIDTH, dtype=np.float16))
    assert result.ops == {"Cast": 2, "RMSNorm": 1}
    assert "another type than its input" in result.reasons


@pytest.mark.parametrize("axis", ["", ", axis = 2", ", axis = -1"])
def test_the_operator_of_opset_23(axis: str) -> None:
    result = fused(model(f"y = RMSNormalization <epsilon = 0.001{axis}> (x, w)", opset=23))
    assert result.ops == {"RMSNorm": 1}
    assert epsilons(result) == [pytest.approx(1e-3)]


def test_the_operator_over_two_axes_stays() -> None:
    result = fused(model("y = RMSNormalization <axis = 1> (x, w)", HEAD.replace("s,", "3,"), opset=23, w=floats(3, 8)))
    assert result.ops == {"RMSNormalization": 1}
    assert "from axis 1 on" in result.reasons


#: Looks like a norm and is none: (what, body, reason).
NEAR_MISSES = [
    ("no epsilon", norm(shift="a = Identity (m)"), "expected Add, found Identity"),
    ("epsilon zero", norm(shift="a = Add (m, zero)"), "epsilon is 0.0"),
    ("epsilon for each token", norm(shift="z = ReduceMax <keepdims = 1> (x, last)  z2 = Mul (z, z)  a = Add (m, z2)"), "'epsilon' must be a constant"),
    ("epsilon for each element", norm(shift="a = Add (m, w)"), "epsilon is no single number"),
    ("pow by 3", norm("q = Pow (x, three)"), "expected the constant 2.0"),
    ("square of something else", norm("z = Neg (x)  q = Mul (z, x)"), "expected 'x'"),
    ("sum instead of mean", norm(mean="m = ReduceSum <keepdims = 1> (q, last)"), "expected ReduceMean, found ReduceSum"),
    ("wrong axis", norm(mean="m = ReduceMean <keepdims = 1> (q, first)"), "ReduceMean.axes is [1]"),
    ("two axes", norm(mean="m = ReduceMean <keepdims = 1> (q, both)"), "ReduceMean.axes is [1, 2]"),
    ("centred by half the mean", norm("u = ReduceMean <keepdims = 1> (x, last)  d = Sub (x, u)  q = Mul (d, d)"), "expected 'x'"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "reason"), [case[1:] for case in NEAR_MISSES], ids=[case[0] for case in NEAR_MISSES])
def test_near_misses(body: str, reason: str) -> None:
    more = {"zero": np.array(0.0, np.float32), "three": np.array(3.0, np.float32)}
    axes = {"first": np.array([1]), "both": np.array([1, 2])}
    result = fused(model(body, **more, **axes))
    assert result.ops["RMSNorm"] == 0
    assert reason in result.reasons


def test_an_inner_tensor_that_is_an_output() -> None:
    result = fused(model(norm(), "agraph (float[b, s, 8] x) => (float[b, s, 8] y, float[b, s, 1] r)"))
    assert result.ops["RMSNorm"] == 0
    assert "an inner tensor is also a graph output" in result.reasons


def test_an_inner_tensor_that_is_used_elsewhere() -> None:
    result = fused(model(norm(weight="p = Mul (n, w)  y = Sub (p, a)")))
    assert result.ops["RMSNorm"] == 0
    assert "an inner tensor is used elsewhere too" in result.reasons


@pytest.mark.parametrize("shape", [(3, 1), (3, 8), (1,)])
def test_a_weight_of_another_shape_stays_a_product(shape: tuple[int, ...]) -> None:
    result = fused(model(norm(), w=floats(*shape, seed=3)))
    assert result.ops == {"RMSNorm": 1, "Mul": 1}
    assert f"the weight has shape {list(shape)}, expected [8]" in result.reasons


def test_a_weight_that_adds_an_axis_stays_a_product() -> None:
    head = "agraph (float[b, s, 8] x) => (float[a, b, s, 8] y)"
    result = fused(model(norm(), head, w=floats(1, 1, 1, WIDTH)))
    assert result.ops == {"RMSNorm": 1, "Mul": 1}
    assert "the weight is no vector" in result.reasons


@pytest.mark.parametrize(("name", "dtype"), [("float16", np.float16), ("double", np.float64)])
def test_a_mean_in_another_type_is_refused(name: str, dtype: Any) -> None:
    constants = {key: CONSTANTS[key].astype(dtype) for key in ("two", "eps", "w")}
    result = fused(model(norm(), HEAD.replace("float", name), **constants), floats(2, 3, WIDTH, dtype=dtype))
    assert result.ops["RMSNorm"] == 0
    assert f"the mean is taken in {name}" in result.reasons


def test_an_unknown_width_is_refused() -> None:
    result = fused(model(norm(), HEAD.replace("8", "d")))
    assert result.ops["RMSNorm"] == 0
    assert "the size of the last axis is unknown" in result.reasons


def test_a_layer_norm_is_left_to_its_own_pass() -> None:
    body = "u = ReduceMean <keepdims = 1> (x, last)  d = Sub (x, u)  q = Mul (d, d)  m = ReduceMean (q, last)  a = Add (m, eps)  r = Sqrt (a)  n = Div (d, r)  y = Mul (n, w)"
    result = fused(model(body))
    assert result.ops["RMSNorm"] == 0
    assert result.reasons == ""


def test_in_branches() -> None:
    body = norm().replace("y =", "p =")
    text = f"y = If (c) <then_branch = t () => (float[b, s, 8] p) {{ {body} }}, else_branch = e () => (float[b, s, 8] z) {{ z = Neg (x) }}>"
    source = model(text, "agraph (float[b, s, 8] x, bool c) => (float[b, s, 8] y)")
    result = fuse(FuseRmsNorm(), source, {"x": floats(2, 3, WIDTH), "c": np.array(True)})
    assert result.ops == {"If": 1, "RMSNorm": 1, "Neg": 1}
