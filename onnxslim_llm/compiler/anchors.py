"""Attentions, norms and rotary embeddings of a model, told by the one node that every spelling of them has.

This knows nothing of the rules that fuse them, so that "2 of 2 attentions are fused" says something: a Softmax whose
result weights other tensors, a mean of squares, a rotated half that is negated. What a model has as one operator
already is counted, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.concept import DOMAIN
from onnxslim_llm.rewrite.constants import constant_value, is_constant
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["KINDS", "Anchor", "Kind", "find_anchors", "follow"]

Kind = Literal["attention", "norm", "rotary"]
KINDS: tuple[Kind, ...] = ("attention", "norm", "rotary")

_CONTRIB = "com.microsoft"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: One operator that is the whole thing: (domain, op without the parts of a concept's name) -> kind.
_OPERATORS: dict[str, dict[str, Kind]] = {
    "": {
        "Attention": "attention",
        "LayerNormalization": "norm",
        "RMSNormalization": "norm",
        "SimplifiedLayerNormalization": "norm",
        "RotaryEmbedding": "rotary",
    },
    _CONTRIB: {
        "Attention": "attention",
        "GroupQueryAttention": "attention",
        "MultiHeadAttention": "attention",
        "DecoderMaskedMultiHeadAttention": "attention",
        "SparseAttention": "attention",
        "PackedMultiHeadAttention": "attention",
        "LayerNormalization": "norm",
        "SimplifiedLayerNormalization": "norm",
        "SkipLayerNormalization": "norm",
        "SkipSimplifiedLayerNormalization": "norm",
        "EmbedLayerNormalization": "norm",
        "RotaryEmbedding": "rotary",
    },
    DOMAIN: {"Attention": "attention", "RMSNorm": "norm", "RotaryHalf": "rotary", "RotaryInterleaved": "rotary"},
}
#: What may lie between a Softmax and the product with the values.
_WEIGHTS = _names("Cast Where Mul Identity Dropout Reshape Transpose Slice IsNaN")
#: What picks or moves elements.
_MOVES = _names("Slice Split Gather Reshape Transpose Squeeze Unsqueeze Cast Identity")
_REACH = 6


@dataclass(frozen=True)
class Anchor:
    """A site.

    Attributes:
        kind: What it is.
        node: Name of the node that tells.
        tensor: Its first output.
        whole: One operator is all of it already.
    """

    kind: Kind
    node: str
    tensor: str
    whole: bool = False


def find_anchors(model: Model) -> list[Anchor]:
    """Return all sites in graph order, those in subgraphs too."""
    return [anchor for graph in model.graphs() for node in graph.nodes for anchor in _anchors(node)]


def _anchors(node: gs.Node) -> Iterator[Anchor]:
    domain = normal_domain(node.domain)
    op = node.op.split("_")[0] if domain == DOMAIN else node.op
    kind = _OPERATORS.get(domain, {}).get(op)
    if not node.outputs:
        return
    name, tensor = node.name, node.outputs[0].name
    if kind is not None:
        yield Anchor(kind, name, tensor, whole=True)
    elif domain == "":
        if node.op == "Softmax" and _weights_values(node):
            yield Anchor("attention", name, tensor)
        elif _squares(node):
            yield Anchor("norm", name, tensor)
        elif node.op == "Neg" and _turns(node):
            yield Anchor("rotary", name, tensor)


def follow(tensor: gs.Tensor, through: frozenset[str] | None, reach: int) -> Iterator[tuple[gs.Node, gs.Tensor]]:
    """Yield (node, tensor that it reads) of what comes after a tensor, nearest first.

    Args:
        tensor: Where to start.
        through: Operators that are passed; all if None.
        reach: Largest number of nodes that are passed.
    """
    front, seen = [tensor], set[int]()
    for _ in range(reach + 1):
        nearer, front = front, []
        for source in nearer:
            for node in source.outputs:
                if id(node) in seen:
                    continue
                seen.add(id(node))
                yield node, source
                if through is None or (node.op in through and normal_domain(node.domain) == ""):
                    front += node.outputs


def _weights_values(softmax: gs.Node) -> bool:
    """Whether a Softmax's result is multiplied with something that is no constant."""
    for node, source in follow(softmax.outputs[0], _WEIGHTS, _REACH):
        if node.op in ("MatMul", "Einsum") and len(node.inputs) == 2:
            other = node.inputs[1] if node.inputs[0] is source else node.inputs[0]
            if not is_constant(other):
                return True
    return False


def _squares(node: gs.Node) -> bool:
    """Whether a node takes the mean, or the sum, of squares."""
    if node.op in ("ReduceL2", "ReduceSumSquare"):
        return True
    return node.op in ("ReduceMean", "ReduceSum") and _is_square(node.inputs[0])


def _is_square(tensor: gs.Tensor) -> bool:
    while isinstance(tensor, gs.Variable) and len(tensor.inputs) == 1:
        node = tensor.inputs[0]
        if node.op in ("Cast", "Identity"):
            tensor = node.inputs[0]
            continue
        if node.op == "Mul":
            return bool(node.inputs[0] is node.inputs[1])
        exponent = constant_value(node.inputs[1]) if node.op == "Pow" else None
        return exponent is not None and exponent.size == 1 and float(exponent.reshape(-1)[0]) == 2.0
    return False


def _turns(negation: gs.Node) -> bool:
    """Whether the negated part of a tensor is put beside another part of it."""
    source = _origin(negation.inputs[0])
    for node, tensor in follow(negation.outputs[0], _MOVES, _REACH):
        if node.op == "Concat" and any(_origin(t) is source for t in node.inputs if t is not tensor):
            return True
    return False


def _origin(tensor: gs.Tensor) -> gs.Tensor:
    while isinstance(tensor, gs.Variable) and len(tensor.inputs) == 1 and tensor.inputs[0].op in _MOVES:
        tensor = tensor.inputs[0].inputs[0]
    return tensor
