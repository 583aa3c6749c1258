"""Rotary embeddings in ai.onnx."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.concepts.rotary import ROTARY
from onnxslim_llm.ir.shapes import shape_of
from onnxslim_llm.passes.lower.attention.shared_expand import SharedExpand
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.facts import onnx_type, rank_of

__all__ = ["ROTARY_OPSET", "rotary_embedding"]

ROTARY_OPSET = 23
_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def rotary_embedding(op: Builder, call: gs.Node, graph: gs.Graph, expand: SharedExpand) -> Sequence[gs.Tensor] | None:
    """Return a RotaryEmbedding, from opset 23 on, with tables that have a row for every token of the batch."""
    x, cosines, sines = call.inputs
    types = {onnx_type(tensor) for tensor in (x, cosines, sines)}
    ranks = [rank_of(tensor) for tensor in (x, cosines, sines)]
    if (op.model.opset() or 0) < ROTARY_OPSET or len(types) != 1 or not types <= set(_TYPES) or ranks != [3, 3, 3]:
        return None
    heads, rotated = int(call.attrs["num_heads"]), int(call.attrs["rotary_dim"])
    shape = shape_of(x)
    whole = shape is not None and shape[-1] == heads * rotated
    rows = [expand.along(op, graph, table, 0, x, 0) for table in (cosines, sines)]
    made = op.RotaryEmbedding(
        x,
        *rows,
        num_heads=heads,
        rotary_embedding_dim=None if whole else rotated,
        interleaved=1 if ROTARY["interleaved"].is_call(call) else None,
    )
    return [made]
