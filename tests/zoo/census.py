"""How many attentions, norms and rotary embeddings of a model are single nodes."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from zoo.architecture import Sites

__all__ = ["count_nodes", "fused_sites"]

# Of ai.onnx and com.microsoft, and the names of the compiler's own forms before they are lowered.
_ATTENTIONS = ("Attention", "GroupQueryAttention", "MultiHeadAttention")
_NORMS = (
    "LayerNormalization",
    "RMSNormalization",
    "RMSNorm",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
)
_ROTARIES = ("RotaryEmbedding", "RotaryHalf", "RotaryInterleaved")


def fused_sites(model: onnx.ModelProto) -> Sites:
    """The fused places of all graphs of `model`.

    An attention that rotates its queries and keys itself counts as two rotary embeddings.
    """
    attentions = norms = rotaries = 0
    for node in _nodes(model.graph):
        name = node.op_type.split("_")[0]
        attentions += name in _ATTENTIONS
        norms += name in _NORMS
        rotaries += name in _ROTARIES
        if name == "GroupQueryAttention":
            rotaries += 2 * any(a.name == "do_rotary" and a.i for a in node.attribute)
    return Sites(attentions, norms, rotaries)


def count_nodes(model: onnx.ModelProto) -> int:
    """Nodes of all graphs of `model`, constants included."""
    return sum(1 for _ in _nodes(model.graph))


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)
