"""Logits of the last token only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.block_weights import BLOCK_MATMUL
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.ir.topology import sort_nodes
from onnxslim_llm.passes.fuse.tokens.axes import ELEMENTWISE
from onnxslim_llm.rewrite.constants import is_constant
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["KeepLastLogits"]

_LOGITS = ("logits", "lm_logits")
_END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class KeepLastLogits(Pass):
    """Compute logits of the last token only, [B, 1, V]: all that generating needs.

    The classifier is the largest product of small models. What asks for the logits of a whole text (perplexity,
    scoring, speculative decoding) cannot use such an artifact, nor can batches that are padded on the right.

    Before:
        logits = MatMul (hidden, W)
    After:
        last = Slice (hidden, [-1], [9223372036854775807], [1])
        logits = MatMul (last, W)

    Skips when:
        - there is no output logits [B, S, V] with S tokens, or it has one token already
        - it is not made by a product with a constant, followed by element-by-element operations with constants
        - the classifier reads the tokens of all texts in one row: [B * S, D]
        - something else reads the logits, or what lies between product and output.
    """

    name: ClassVar[str] = "keep_last_logits"
    group: ClassVar[str] = "fuse"

    def apply(self, model: Model, context: Context) -> Change:
        """Cut before the classifier."""
        change = Change()
        logits = next((tensor for tensor in model.graph.outputs if tensor.name in _LOGITS), None)
        if logits is None:
            change.skip("the model", "it has no output 'logits'")
            return change
        values = infer_shapes(model)
        shape = values.shape_of(logits)
        if shape is None or len(shape) != 3:
            change.skip(logits.name, "its shape is not [batch, tokens, vocabulary]")
            return change
        if shape[1] == 1:
            change.skip(logits.name, "it has one token already")
            return change
        product, reason = _product(logits, graph_output_ids(model))
        if product is None:
            change.skip(logits.name, reason)
            return change
        hidden = product.inputs[0]
        before = values.shape_of(hidden)
        if before is None or len(before) != 3 or before[:2] != shape[:2]:
            change.skip(product.name or logits.name, "the classifier does not read [batch, tokens, size]")
            return change
        op = Builder(model, product.name or logits.name)
        last = op.Slice(hidden, np.array([-1], np.int64), np.array([_END], np.int64), np.array([1], np.int64))
        last.dtype = hidden.dtype
        product.inputs[0] = last
        _forget_shapes(product, logits)
        logits.shape = [*logits.shape[:1], 1, *logits.shape[2:]]
        model.graph.nodes += op.nodes
        sort_nodes(model.graph)
        change.sites.append(product.name or logits.name)
        return change


def _product(logits: gs.Tensor, outputs: set[int]) -> tuple[gs.Node | None, str]:
    """Return the classifier's product behind `logits`, or None and why there is none."""
    tensor = logits
    while isinstance(tensor, gs.Variable) and tensor.inputs:
        if tensor.outputs and tensor is logits:
            return None, "something in the model reads the logits"
        if tensor is not logits and (len(tensor.outputs) != 1 or id(tensor) in outputs):
            return None, f"'{tensor.name}' is used elsewhere, too"
        node = tensor.inputs[0]
        plain = normal_domain(node.domain) == ""
        if BLOCK_MATMUL.is_call(node) or (plain and node.op == "MatMul" and _is_weight(node.inputs[1])):
            return node, ""
        moving = [t for t in node.inputs if not t.is_empty() and not is_constant(t)]
        if not plain or node.op not in ELEMENTWISE or len(moving) != 1:
            return None, f"{node.op} '{node.name}' makes it, no product with a matrix of weights"
        tensor = moving[0]
    return None, "nothing makes it"


def _is_weight(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a constant, transposed or cast perhaps: a classifier that shares the embedding's weight."""
    while isinstance(tensor, gs.Variable) and len(tensor.inputs) == 1:
        node = tensor.inputs[0]
        if normal_domain(node.domain) != "" or node.op not in ("Transpose", "Cast", "Identity", "DequantizeLinear"):
            return is_constant(tensor)
        tensor = node.inputs[0]
    return is_constant(tensor)


def _forget_shapes(node: gs.Node, last: gs.Tensor) -> None:
    """Remove what is known about the tensors from a node down to the output: they have one token now."""
    tensor = node.outputs[0]
    while tensor is not last:
        tensor.shape = None
        tensor = tensor.outputs[0].outputs[0]
    last.__dict__.pop("derived_shape", None)
