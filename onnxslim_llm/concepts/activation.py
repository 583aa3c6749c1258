"""Activations that ai.onnx got names for late: Gelu (opset 20) and Swish (opset 24).

The spellings of the bodies are ones that ONNX Runtime recognises, for artifacts of older opsets.
"""

from __future__ import annotations

from onnxslim_llm.concepts.concept import Concept

__all__ = ["GELU", "GELU_TANH", "SWISH"]

#: Y = X * sigmoid(alpha * X); SiLU with alpha = 1, the "quick" Gelu with alpha = 1.702.
SWISH = Concept(
    "Swish",
    """<alpha> (X) => (Y) {
        a = Constant <value_float: float = @alpha> ()
        a_like = CastLike (a, X)
        scaled = Mul (X, a_like)
        gate = Sigmoid (scaled)
        Y = Mul (X, gate)
    }""",
    min_opset=18,
)

#: Y = X / 2 * (1 + erf(X / sqrt(2))).
GELU = Concept(
    "Gelu",
    """(X) => (Y) {
        root = Constant <value_float = 1.4142135623730951> ()
        root_like = CastLike (root, X)
        scaled = Div (X, root_like)
        e = Erf (scaled)
        one = Constant <value_float = 1.0> ()
        one_like = CastLike (one, X)
        shifted = Add (e, one_like)
        product = Mul (X, shifted)
        half = Constant <value_float = 0.5> ()
        half_like = CastLike (half, X)
        Y = Mul (product, half_like)
    }""",
    min_opset=18,
)

#: Y = X / 2 * (1 + tanh(sqrt(2 / pi) * (X + 0.044715 X^3))).
GELU_TANH = Concept(
    "GeluTanh",
    """(X) => (Y) {
        three = Constant <value_float = 3.0> ()
        cube = Pow (X, three)
        third = Constant <value_float = 0.044715> ()
        third_like = CastLike (third, X)
        bent = Mul (cube, third_like)
        sum = Add (X, bent)
        root = Constant <value_float = 0.7978845608028654> ()
        root_like = CastLike (root, X)
        scaled = Mul (sum, root_like)
        t = Tanh (scaled)
        one = Constant <value_float = 1.0> ()
        one_like = CastLike (one, X)
        shifted = Add (t, one_like)
        half = Constant <value_float = 0.5> ()
        half_like = CastLike (half, X)
        halved = Mul (X, half_like)
        Y = Mul (halved, shifted)
    }""",
    min_opset=18,
)
