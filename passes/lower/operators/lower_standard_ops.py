"""Norms, activations, rotary embeddings and attention in standard ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from onnxslim_llm.concepts.activation import GELU, GELU_TANH, SWISH
from onnxslim_llm.concepts.concept import calls
from onnxslim_llm.concepts.normalization import RMS_NORM
from onnxslim_llm.concepts.rotary import ROTARY
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.passes.lower.attention.lower_attention import LowerAttention
from onnxslim_llm.passes.lower.attention.shared_expand import SharedExpand
from onnxslim_llm.passes.lower.operators.activation_ops import gelu, swish, swish_product
from onnxslim_llm.passes.lower.operators.concept_calls import Lowering, lower_calls
from onnxslim_llm.passes.lower.operators.norm_ops import rms_normalization
from onnxslim_llm.passes.lower.operators.rotary_ops import rotary_embedding
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.registry import make_pass

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["LowerStandardOps"]


@dataclass(frozen=True)
class LowerStandardOps(Pass):
    """Turn fused norms, activations, rotary embeddings and attention into what ai.onnx has for them.

    With opset 23: RMSNormalization, RotaryEmbedding and Attention; with opset 20: Gelu. What the model's opset has no
    operator for becomes primitive operators. Cleanup follows where anything was replaced.

    Before:
        n = onnxslim_llm.RMSNorm <epsilon = 1e-6> (x, weight)
        y = onnxslim_llm.Swish <alpha = 1.0> (n)
    After:
        n = RMSNormalization <axis = -1, epsilon = 1e-6> (x, weight)
        s = Sigmoid (n)
        y = Mul (n, s)
    Skips when:
        - the model's opset has no such operator, or the operator cannot express the form (a window of attention, a type
          without kernels): primitive operators take its place.

    Attributes:
        swish: "product" writes x * sigmoid(alpha * x), which ONNX Runtime fuses; "operator" writes the Swish of opset
            24, for which ONNX Runtime 1.31 has no kernel: it takes 2 to 6 times as long.
    """

    name: ClassVar[str] = "lower_standard_ops"
    group: ClassVar[str] = "lower"
    lossless: ClassVar[bool] = False  # without lowering there is no artifact to fall back to

    swish: Literal["product", "operator"] = "product"

    def apply(self, model: Model, context: Context) -> Change:
        """Replace all calls of fused concepts; those of quantized weights are left for the next pass."""
        change = Change()
        if next(calls(model), None) is None:
            return change
        change.extend(LowerAttention(opset=0).apply(model, context))
        infer_shapes(model)
        expand = SharedExpand()
        rotary: Lowering = lambda op, call, graph: rotary_embedding(op, call, graph, expand)  # noqa: E731
        table: dict[str, Lowering] = {
            GELU.name: lambda op, call, graph: gelu(op, call),
            GELU_TANH.name: lambda op, call, graph: gelu(op, call),
            SWISH.name: lambda op, call, graph: (swish if self.swish == "operator" else swish_product)(op, call),
            RMS_NORM.name: lambda op, call, graph: rms_normalization(op, call),
            **dict.fromkeys((concept.name for concept in ROTARY.values()), rotary),
        }
        lower_calls(model, table.get, change)
        if change:
            model.refresh_names()
            tidied = make_pass("cleanup", {}).apply(model, context)
            change.detail["cleanup"] = tidied.detail["sites"]
        return change
