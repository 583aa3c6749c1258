"""Concepts as the operators that compilers for neural processors know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.activation import GELU, GELU_TANH, SWISH
from onnxslim_llm.concepts.block_weights import BLOCK_GATHER, BLOCK_MATMUL
from onnxslim_llm.concepts.concept import calls
from onnxslim_llm.concepts.normalization import RMS_NORM
from onnxslim_llm.concepts.opset import raise_opset
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.passes.lower.empty_operands import drop_empty_operands
from onnxslim_llm.passes.lower.operators.activation_ops import GELU_OPSET, gelu, swish_product
from onnxslim_llm.passes.lower.operators.concept_calls import Lowering, lower_calls
from onnxslim_llm.passes.lower.operators.norm_ops import RMS_NORM_OPSET, rms_normalization
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.registry import make_pass

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["LowerNpuOps"]

#: Concepts of quantized weights have a lowering of their own.
_WEIGHTS = (BLOCK_MATMUL.name, BLOCK_GATHER.name)


def _body(op: Builder, call: gs.Node, graph: gs.Graph) -> None:
    """Let the body of the concept's function take its place."""


@dataclass(frozen=True)
class LowerNpuOps(Pass):
    """Keep norms and Gelu whole, and take attention and rotary embeddings apart, into products that take few bits.

    Compilers for neural processors have kernels for norms, whose squares and means need more than 8 or 16 bits, but
    none for attention. The opset becomes 23 for RMSNormalization where `native_norms` asks for it, else stays.

    Before:
        n = onnxslim_llm.RMSNorm <epsilon = 1e-6> (x, weight)
        y = onnxslim_llm.Gelu (n)
    After:
        n = RMSNormalization <axis = -1, epsilon = 1e-6> (x, weight)
        y = Gelu (n)
    Skips when:
        - the model cannot be converted to the opset that has the operator: primitive operators take its place.

    Attributes:
        native_norms: Write RMSNormalization of opset 23; else primitive operators.
        native_gelu: Write Gelu of opset 20; else primitive operators.
    """

    name: ClassVar[str] = "lower_npu_ops"
    group: ClassVar[str] = "lower"
    lossless: ClassVar[bool] = False  # without lowering there is no artifact to fall back to

    native_norms: bool = True
    native_gelu: bool = True

    def apply(self, model: Model, context: Context) -> Change:
        """Replace all calls of fused concepts; those of quantized weights are left for the next pass."""
        change = Change()
        if next(calls(model), None) is None:
            return change
        if self.native_norms and next(calls(model, RMS_NORM), None) is not None:
            raise_opset(model, change, RMS_NORM_OPSET)
        table: dict[str, Lowering] = {SWISH.name: lambda op, call, graph: swish_product(op, call)}
        if self.native_gelu:
            if next(calls(model, GELU, GELU_TANH), None) is not None:
                raise_opset(model, change, GELU_OPSET)
            table |= dict.fromkeys((GELU.name, GELU_TANH.name), lambda op, call, graph: gelu(op, call))
        if self.native_norms:
            table[RMS_NORM.name] = lambda op, call, graph: rms_normalization(op, call)
        lower_calls(model, lambda name: None if name in _WEIGHTS else table.get(name, _body), change)
        if change:
            model.refresh_names()
            infer_shapes(model)
            drop_empty_operands(model)  # parts of heads that are not rotated, where all are
            tidied = make_pass("cleanup", {}).apply(model, context)
            change.detail["cleanup"] = tidied.detail["sites"]
        return change
