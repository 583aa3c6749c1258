"""What a weight is for, told from how the graph uses it; names are never read.

- embedding: a two-dimensional table that Gather looks up on the way to the residual stream.
- attention: a matmul whose result reaches an attention core before any other weight, or whose input comes from one. A
  core is an attention operator, or a MatMul of two activations.
- lm_head: a matmul whose result is a graph output, up to bias, scaling and reshaping, and not added to a residual.
- ffn: every other matmul. A bias belongs to its matmul.
- norm: scale and shift of a normalisation, fused or spelled out.
- other: the rest (rotary tables, convolutions, shapes).

A weight with several uses takes the first role of `ROLES` that one of them gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model


__all__ = ["ROLES", "constant_roles"]

ROLES = ("embedding", "attention", "ffn", "norm", "lm_head", "other")
_PRECEDENCE = ("embedding", "lm_head", "attention", "ffn", "norm", "other")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MATMULS = _names(
    "MatMul Gemm FusedMatMul FusedGemm MatMulNBits MatMulBnb4 BlockMatMul MatMulInteger MatMulIntegerToFloat "
    "QLinearMatMul DynamicQuantizeMatMul MatMulPacked"
)
_GATHERS = frozenset({"Gather", "GatherBlockQuantized", "GatherPacked", "BlockGather", "EmbedLayerNormalization"})
_ATTENTIONS = _names(
    "Attention GroupQueryAttention MultiHeadAttention DecoderMaskedMultiHeadAttention PackedAttention "
    "PackedMultiHeadAttention PagedAttention SparseAttention QAttention LongformerAttention LinearAttention"
)
_EXPERTS = frozenset({"MoE", "QMoE"})
_NORMS = _names(
    "LayerNormalization RMSNormalization SimplifiedLayerNormalization SkipLayerNormalization GroupNormalization "
    "SkipSimplifiedLayerNormalization InstanceNormalization BatchNormalization"
)
# They pass a weight on under another type or shape: the weight's role is the role of what comes after.
_CARRIERS = _names(
    "Identity Cast Transpose Reshape Unsqueeze Squeeze Flatten DequantizeLinear QuantizeLinear Slice Split "
    "Concat Expand"
)
# Between a model's last matmul and its output: bias, scaling, soft capping, type and shape.
_LIGHT = _names(
    "Identity Cast Transpose Reshape Unsqueeze Squeeze Slice Add Sub Mul Div Tanh DequantizeLinear QuantizeLinear "
    "Sigmoid Softmax LogSoftmax ArgMax"
)
# They look at a tensor's dimensions only; no content flows through them.
_MEASURES = frozenset({"Shape", "Size"})
_SECOND_OPERAND_CARRIERS = frozenset({"DequantizeLinear", "QuantizeLinear", "Concat"})


def constant_roles(model: Model) -> list[tuple[gs.Constant, str]]:
    """Every distinct constant of the model's graphs with its role, in graph order."""
    found: dict[int, tuple[gs.Constant, str]] = {}
    for graph in model.graphs():
        flow = _Flow(graph)
        for constant in _constants(graph):
            role = min((flow.role(node, i, constant) for node, i in _uses(constant)), key=_rank, default="other")
            known = found.get(id(constant))
            if known is None or _rank(role) < _rank(known[1]):
                found[id(constant)] = (constant, role)
    return list(found.values())


def _rank(role: str) -> int:
    return _PRECEDENCE.index(role)


def _constants(graph: gs.Graph) -> Iterator[gs.Constant]:
    seen: set[int] = set()
    for node in graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def _uses(tensor: gs.Tensor, depth: int = 8) -> Iterator[tuple[gs.Node, int]]:
    """The nodes that compute with `tensor`, and as which input, seen through carriers."""
    for node in tensor.outputs:
        index = next(i for i, other in enumerate(node.inputs) if other is tensor)
        carried = index == 0 or node.op in _SECOND_OPERAND_CARRIERS
        if node.op in _CARRIERS and carried and depth:
            for output in node.outputs:
                yield from _uses(output, depth - 1)
        else:
            yield node, index


class _Flow:
    """Which nodes of a graph lead to an attention core, come from one, or lead to an output: one sweep each way."""

    def __init__(self, graph: gs.Graph) -> None:
        self._weighted = {
            id(node) for constant in _constants(graph) for node, _ in _uses(constant) if node.op in _MATMULS
        }
        outputs = {id(tensor) for tensor in graph.outputs}
        self._to_core: set[int] = set()
        self._to_output: set[int] = set()
        self._from_core: set[int] = set()
        for node in reversed(graph.nodes):
            after = [n for tensor in node.outputs for n in tensor.outputs if n.op not in _MEASURES]
            if any(self._is_core(n) or (id(n) in self._to_core and id(n) not in self._weighted) for n in after):
                self._to_core.add(id(node))
            final = any(id(tensor) in outputs for tensor in node.outputs)
            if final or any(id(n) in self._to_output and _is_light(n) for n in after):
                self._to_output.add(id(node))
        for node in graph.nodes:
            before = [n for tensor in node.inputs for n in tensor.inputs if n.op not in _MEASURES]
            if any(self._is_core(n) or (id(n) in self._from_core and id(n) not in self._weighted) for n in before):
                self._from_core.add(id(node))

    def role(self, node: gs.Node, index: int, constant: gs.Constant) -> str:
        """The role that the use as input `index` of `node` gives to a constant."""
        if node.op in _GATHERS:
            return "embedding" if len(constant.shape) == 2 and id(node) not in self._to_core else "other"
        if node.op in _MATMULS:
            return self._matmul_role(node)
        if node.op in _EXPERTS:
            return "ffn"
        if node.op in _ATTENTIONS:
            return "attention" if len(constant.shape) == 2 and index == 1 else "other"
        if node.op in _NORMS:
            return "norm"
        if node.op in ("Add", "Mul", "Sub", "Div") and _is_vector(constant):
            return self._vector_role(node)
        return "other"

    def _matmul_role(self, node: gs.Node) -> str:
        if id(node) in self._to_core:
            return "attention"
        if id(node) in self._to_output:
            return "lm_head"
        return "attention" if id(node) in self._from_core else "ffn"

    def _vector_role(self, node: gs.Node) -> str:
        for tensor in node.inputs:
            for producer in tensor.inputs:
                if id(producer) in self._weighted:
                    return self._matmul_role(producer)
        return "norm"

    def _is_core(self, node: gs.Node) -> bool:
        return node.op in _ATTENTIONS or (node.op == "MatMul" and id(node) not in self._weighted)


def _is_light(node: gs.Node) -> bool:
    """Whether the node leaves its input what it was; an Add of two activations is a residual."""
    if node.op in ("Add", "Sub", "Mul", "Div"):
        return any(isinstance(tensor, gs.Constant) for tensor in node.inputs)
    if node.op == "Gather":  # puts logits into other places
        return isinstance(node.inputs[1], gs.Constant)
    return bool(node.op in _LIGHT)


def _is_vector(constant: gs.Constant) -> bool:
    return bool(sum(size > 1 for size in constant.shape) == 1)
