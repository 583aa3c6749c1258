# ruff: noqa: E501 (one graph a line)
from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from fusion_checks import Array, Fused, floats, fuse, proto

from onnxslim_llm.concepts.activation import SWISH
from onnxslim_llm.concepts.concept import calls
from onnxslim_llm.passes.fuse.fuse_activations import FuseActivations

CONSTANTS: dict[str, Any] = {
    "half": 0.5,
    "one": 1.0,
    "two": 2.0,
    "three": 3.0,
    "root2": 2**0.5,
    "rhalf": 0.5**0.5,
    "cubic": 0.044715,
    "rpi": (2 / np.pi) ** 0.5,
    "alpha": 1.702,
}
HEAD = "agraph (float[b, s, 8] x) => (float[b, s, 8] y)"


def model(
    body: str, head: str = HEAD, opset: int = 18, imports: str = "", dtype: Any = np.float32, **constants: Array
) -> onnx.ModelProto:
    known = {**{name: np.array(value, dtype) for name, value in CONSTANTS.items()}, **constants}
    used = {name: value for name, value in known.items() if f"{name})" in body or f"{name}," in body}
    return proto(f"{head} {{ {body} }}", opset, imports=imports, **used)


def fused(source: onnx.ModelProto, x: Array | None = None, **options: Any) -> Fused:
    return fuse(FuseActivations(), source, {"x": floats(2, 3, 8) * 3 if x is None else x}, **options)


#: x / 2 * e in the orders of exporters.
ORDERS = [
    "p = Mul (x, e)  y = Mul (p, half)",
    "p = Mul (e, x)  y = Div (p, two)",
    "p = Mul (x, half)  y = Mul (p, e)",
    "p = Div (x, two)  y = Mul (e, p)",
    "p = Mul (half, e)  y = Mul (x, p)",
    "p = Div (e, two)  y = Mul (p, x)",
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("argument", ["a = Div (x, root2)", "a = Mul (x, rhalf)", "a = Mul (rhalf, x)"])
def test_gelu(argument: str, order: str) -> None:
    result = fused(model(f"{argument}  f = Erf (a)  e = Add (f, one)  {order}"))
    assert result.ops == {"Gelu": 1}
    assert result.sites == 1


#: sqrt(2 / pi) * (x + 0.044715 x^3).
ARGUMENTS = [
    "c = Pow (x, three)  d = Mul (c, cubic)  g = Add (x, d)  a = Mul (g, rpi)",
    "c = Mul (x, x)  d = Mul (c, x)  h = Mul (cubic, d)  g = Add (x, h)  a = Mul (rpi, g)",
    "c = Pow (x, two)  d = Mul (x, c)  h = Mul (cubic, d)  g = Add (h, x)  a = Mul (rpi, g)",
    "c = Mul (x, x)  d = Mul (c, cubic)  h = Mul (x, d)  g = Add (x, h)  a = Mul (g, rpi)",
    "c = Mul (x, cubic)  d = Mul (c, x)  h = Mul (x, d)  g = Add (x, h)  a = Mul (g, rpi)",
    "c = Mul (x, rpi)  d = Mul (x, cubic)  h = Mul (d, x)  g = Add (h, one)  a = Mul (c, g)",
    "c = Mul (x, x)  d = Mul (c, cubic)  g = Add (one, d)  h = Mul (g, rpi)  a = Mul (x, h)",
    "c = Mul (x, x)  d = Mul (c, cubic)  g = Add (one, d)  h = Mul (g, x)  a = Mul (rpi, h)",
]


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_gelu_by_tanh(argument: str) -> None:
    result = fused(model(f"{argument}  f = Tanh (a)  e = Add (one, f)  {ORDERS[4]}"))
    assert result.ops == {"GeluTanh": 1}


@pytest.mark.parametrize("order", ORDERS)
def test_orders_of_gelu_by_tanh(order: str) -> None:
    assert fused(model(f"{ARGUMENTS[0]}  f = Tanh (a)  e = Add (f, one)  {order}")).ops == {"GeluTanh": 1}


def test_in_half_precision_constants_are_rounded() -> None:
    source = model(
        f"{ARGUMENTS[0]}  f = Tanh (a)  e = Add (f, one)  {ORDERS[0]}",
        HEAD.replace("float", "float16"),
        dtype=np.float16,
    )
    # The same operators in another order: a few roundings to 11 bits of numbers up to ten.
    assert fused(source, floats(2, 3, 8, dtype=np.float16), tolerance=2**-8).ops == {"GeluTanh": 1}


@pytest.mark.parametrize(
    ("body", "alpha"),
    [
        ("g = Sigmoid (x)  y = Mul (x, g)", 1.0),
        ("g = Sigmoid (x)  y = Mul (g, x)", 1.0),
        ("a = Mul (x, alpha)  g = Sigmoid (a)  y = Mul (x, g)", 1.702),
        ("n = Neg (x)  e = Exp (n)  d = Add (one, e)  y = Div (x, d)", 1.0),
    ],
)
def test_swish(body: str, alpha: float) -> None:
    result = fused(model(body))
    assert result.ops == {"Swish": 1}
    assert [node.attrs["alpha"] for _, node in calls(result.model, SWISH)] == [pytest.approx(alpha)]


def test_swish_of_a_product_with_a_number() -> None:
    assert fused(model("a = Mul (x, alpha)  g = Sigmoid (a)  y = Mul (a, g)")).ops == {"Mul": 1, "Swish": 1}


@pytest.mark.parametrize(
    ("body", "op", "opset"),
    [
        ("y = Gelu (x)", "Gelu", 20),
        ('y = Gelu <approximate = "tanh"> (x)', "GeluTanh", 20),
        ("y = com.microsoft.Gelu (x)", "Gelu", 18),
        ("y = com.microsoft.FastGelu (x)", "GeluTanh", 18),
        ("y = com.microsoft.QuickGelu (x)", "Swish", 18),
    ],
)
def test_operators_that_are_activations(body: str, op: str, opset: int) -> None:
    # com.microsoft FastGelu approximates tanh.
    result = fused(model(body, opset=opset, imports=', "com.microsoft": 1'), tolerance=1e-4)
    assert [node.op for node in result.model.graph.nodes] == [op]
    assert result.sites == 1


def test_an_older_model_is_converted() -> None:
    result = fused(model("g = Sigmoid (x)  y = Mul (x, g)", opset=13))
    assert result.ops == {"Swish": 1}
    assert result.model.opset() == 18
    assert fused(model("y = Mul (x, half)", opset=13)).model.opset() == 13


ERF = "a = Div (x, root2)  f = Erf (a)  e = Add (f, one)"
NEAR_MISSES = [
    ("another root", ERF.replace("root2", "rpi") + "  " + ORDERS[0], "expected the constant 1.41421"),
    ("another shift", ERF.replace("one", "two") + "  " + ORDERS[0], "expected the constant 1.0"),
    ("another factor", f"{ERF}  p = Mul (x, e)  y = Mul (p, two)", "expected the constant 0.5"),
    ("another tensor", f"{ERF}  n = Neg (x)  p = Mul (n, e)  y = Mul (p, half)", "expected 'x'"),
    ("another power", f"c = Pow (x, two)  d = Mul (c, cubic)  g = Add (x, d)  a = Mul (g, rpi)  f = Tanh (a)  e = Add (f, one)  {ORDERS[0]}", "expected the constant 3.0"),
    ("alpha for each element", "a = Mul (x, vector)  g = Sigmoid (a)  y = Mul (x, g)", "alpha is no single number"),
    ("alpha that is computed", "m = ReduceMax (x)  a = Mul (x, m)  g = Sigmoid (a)  y = Mul (x, g)", "'alpha' must be a constant"),
    ("another gate", "n = Neg (x)  a = Mul (n, alpha)  g = Sigmoid (a)  y = Mul (x, g)", "expected 'x'"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "reason"), [case[1:] for case in NEAR_MISSES], ids=[case[0] for case in NEAR_MISSES])
def test_near_misses(body: str, reason: str) -> None:
    result = fused(model(body, vector=floats(8)))
    assert result.sites == 0
    assert reason in result.reasons


def test_a_factor_that_broadcasts() -> None:
    head = "agraph (float[b, s, 8] x) => (float[a, b, s, 8] y)"
    result = fused(model(f"{ERF}  {ORDERS[0]}", head, half=np.full((1, 1, 1, 1), 0.5, np.float32)))
    assert result.sites == 0
    assert "more axes than the input" in result.reasons
    same = fused(
        model(
            f"{ERF}  {ORDERS[0]}",
            "agraph (float[b, 1, 8] x) => (float[b, 3, 8] y)",
            half=np.full((3, 8), 0.5, np.float32),
        ),
        floats(2, 1, 8),
    )
    assert same.sites == 0


def test_an_inner_tensor_that_is_used_elsewhere() -> None:
    result = fused(
        model(
            "a = Mul (x, alpha)  g = Sigmoid (a)  y = Mul (x, g)",
            "agraph (float[b, s, 8] x) => (float[b, s, 8] y, float[b, s, 8] g)",
        )
    )
    assert result.sites == 0
    assert "an inner tensor is also a graph output" in result.reasons


@pytest.mark.parametrize(
    "body", ["y = HardSwish (x)", "g = HardSigmoid (x)  y = Mul (x, g)", "g = Sigmoid (x)  n = Neg (x)  y = Mul (g, n)"]
)
def test_other_activations_are_left(body: str) -> None:
    assert fused(model(body)).sites == 0


def test_double_precision_is_left() -> None:
    source = model(
        "a = Mul (x, alpha)  g = Sigmoid (a)  y = Mul (x, g)", HEAD.replace("float", "double"), dtype=np.float64
    )
    result = fused(source, floats(2, 3, 8, dtype=np.float64))
    assert result.sites == 0
    assert "another type than 16 or 32-bit floats" in result.reasons


def test_an_older_model_that_cannot_be_converted_is_left() -> None:
    text = """<ir_version: 4, opset_import: ["" : 9]>
        agraph (float[1, 1, 2, 2] x) => (float[1, 1, 4, 4] y) <float[4] scales = {1.0, 1.0, 2.0, 2.0}>
        { g = Sigmoid (x)  p = Mul (x, g)  y = Upsample (p, scales) }"""
    result = fused(onnx.parser.parse_model(text), floats(1, 1, 2, 2))
    assert result.sites == 0
    assert result.model.opset() == 9
    assert "the model stays at opset 9: Upsample cannot be converted" in result.reasons
