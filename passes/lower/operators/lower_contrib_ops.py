"""Norms, activations and rotary embeddings in the operators of ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from onnxslim_llm.concepts.activation import GELU, GELU_TANH, SWISH
from onnxslim_llm.concepts.concept import calls
from onnxslim_llm.concepts.normalization import RMS_NORM
from onnxslim_llm.concepts.opset import raise_opset
from onnxslim_llm.concepts.rotary import ROTARY
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.passes.lower.attention.shared_expand import SharedExpand
from onnxslim_llm.passes.lower.operators.activation_ops import bias_gelu, quick_gelu
from onnxslim_llm.passes.lower.operators.concept_calls import Lowering, lower_calls
from onnxslim_llm.passes.lower.operators.norm_ops import rms_normalization
from onnxslim_llm.passes.lower.operators.rotary_ops import rotary_embedding
from onnxslim_llm.passes.lower.operators.skip_norm_ops import CONTRIB_DOMAIN, fold_residuals
from onnxslim_llm.rewrite.edit import remove_dead
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["LowerContribOps"]

_VERSION = 1
_CONCEPTS = (RMS_NORM, GELU, GELU_TANH, SWISH, *ROTARY.values())


@dataclass(frozen=True)
class LowerContribOps(Pass):
    """Turn fused norms, activations and rotary embeddings into the operators that ONNX Runtime runs fastest.

    Where the standard operator is as fast as ONNX Runtime's own, it is taken: RMSNormalization and RotaryEmbedding of
    opset 23, Gelu of opset 20. A Swish becomes QuickGelu, and a bias in front of a Gelu goes into BiasGelu or FastGelu.

    Before:
        h = Add (x, bias)
        g = onnxslim_llm.Gelu (h)
        y = onnxslim_llm.Swish <alpha = 1.0> (z)
    After:
        g = com.microsoft.BiasGelu (x, bias)
        y = com.microsoft.QuickGelu <alpha = 1.0> (z)
    Skips when:
        - the model cannot be converted to `opset`: what its own has no operator for becomes primitive operators.

    Attributes:
        opset: Version of ai.onnx that an older model is converted to if it has something to lower.
        skip_norms: Which norms take in the residual sum before them: "none", "rms" (SkipSimplifiedLayerNormalization:
            the form that other tools know, for at most 1 % of the time of a prompt) or "all" (SkipLayerNormalization,
            too, with which ONNX Runtime 1.31 takes 3 to 5 times as long as with sum and norm).
    """

    name: ClassVar[str] = "lower_contrib_ops"
    group: ClassVar[str] = "lower"
    lossless: ClassVar[bool] = False  # without lowering there is no artifact to fall back to

    opset: int = 24
    skip_norms: Literal["none", "rms", "all"] = "rms"

    def apply(self, model: Model, context: Context) -> Change:
        """Replace all calls of these concepts; attention and quantized weights have passes of their own."""
        change = Change()
        found = next(calls(model, *_CONCEPTS), None) is not None
        if not found and self.skip_norms != "all":
            return change
        if found:
            raise_opset(model, change, self.opset)
        infer_shapes(model)
        change.sites += fold_residuals(model, rms=self.skip_norms != "none", layer=self.skip_norms == "all")
        outputs = graph_output_ids(model)
        expand = SharedExpand()
        rotary: Lowering = lambda op, call, graph: rotary_embedding(op, call, graph, expand)  # noqa: E731
        table: dict[str, Lowering] = {
            GELU.name: lambda op, call, graph: bias_gelu(op, call, outputs),
            GELU_TANH.name: lambda op, call, graph: bias_gelu(op, call, outputs),
            SWISH.name: lambda op, call, graph: quick_gelu(op, call),
            RMS_NORM.name: lambda op, call, graph: rms_normalization(op, call),
            **dict.fromkeys((concept.name for concept in ROTARY.values()), rotary),
        }
        lower_calls(model, table.get, change)
        _sweep(model, outputs)
        if model.opset(CONTRIB_DOMAIN) is None and any(
            node.domain == CONTRIB_DOMAIN for graph in model.graphs() for node in graph.nodes
        ):
            model.set_opset(CONTRIB_DOMAIN, _VERSION)
        return change


def _sweep(model: Model, outputs: set[int]) -> None:
    """Remove the sums whose only reader took them in."""
    for graph in model.graphs():
        sums = [node for node in graph.nodes if node.op == "Add" and not any(t.outputs for t in node.outputs)]
        gone = {id(node) for node in remove_dead(sums, outputs)}
        if gone:
            graph.nodes[:] = [node for node in graph.nodes if id(node) not in gone]
