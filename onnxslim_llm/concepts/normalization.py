"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467) over the last axis.

LayerNormalization needs no concept: ai.onnx has had it since opset 17.
"""

from __future__ import annotations

from onnxslim_llm.concepts.concept import Concept

__all__ = ["RMS_NORM"]

# The spelling is one that ONNX Runtime recognises where the body ends up in an artifact.
#: Y = X / sqrt(mean(X^2) + epsilon) * scale. X[..., D], scale[D]. The mean is taken in float32, whatever type X has.
RMS_NORM = Concept(
    "RMSNorm",
    """<epsilon> (X, scale) => (Y) {
        wide = Cast <to = 1> (X)
        two = Constant <value_float = 2.0> ()
        square = Pow (wide, two)
        last = Constant <value_ints = [-1]> ()
        mean = ReduceMean <keepdims = 1> (square, last)
        eps = Constant <value_float: float = @epsilon> ()
        shifted = Add (mean, eps)
        root = Sqrt (shifted)
        unit = Div (wide, root)
        narrow = CastLike (unit, X)
        Y = Mul (narrow, scale)
    }""",
    min_opset=18,
)
