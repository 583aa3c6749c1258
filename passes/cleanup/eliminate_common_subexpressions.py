"""What is computed twice is computed once."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Hashable, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxslim_llm.ir.ownership import subgraphs
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.rewrite.edit import remove_dead, replace_output
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.schema import COMMUTATIVE, attribute_default, normal_domain, schema_of

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["EliminateCommonSubexpressions"]

#: Nodes that do not give the same result twice, and quantization: runtimes fuse a DequantizeLinear only with one user.
_LEFT_ALONE = frozenset(
    (
        *("Bernoulli", "Dropout", "Multinomial"),
        *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
        *("DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"),
    )
)
_Seen = MutableMapping[Hashable, gs.Node]


@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Compute equal nodes (same operator, attributes and inputs) once.

    Attributes are compared with their defaults filled in, commutative inputs in any order. A node of a subgraph gives
    way to an equal one of a graph around it.

    Before:
        agraph (float[N] x) => (float[N] y) {
            a = Exp (x)
            b = Exp (x)
            y = Mul (a, b)
        }

    After:
        agraph (float[N] x) => (float[N] y) {
            a = Exp (x)
            y = Mul (a, a)
        }

    Skips when:
        - both results are outputs of a graph, or one is the output of a subgraph and the other outside of it
        - the operator is random, quantizes, has a subgraph, or is not of the standard domain (it may have state)
    """

    name: ClassVar[str] = "eliminate_common_subexpressions"
    group: ClassVar[str] = "cleanup"

    def apply(self, model: Model, context: Context) -> Change:
        """Walk the graphs in order; what was seen first stays."""
        work = _Work(model)
        work.visit(model.graph, ChainMap())
        if work.duplicates:
            gone = {id(node) for node in remove_dead(work.duplicates, work.outputs)}
            for graph in model.graphs():
                graph.nodes[:] = [node for node in graph.nodes if id(node) not in gone]
        return work.change


class _Work:
    def __init__(self, model: Model) -> None:
        self.outputs = graph_output_ids(model)
        self.opset = model.opset() or 1
        self.change = Change()
        self.duplicates: list[gs.Node] = []
        self._alive: list[gs.Tensor] = []  # tensors whose ids are in keys
        for graph in model.graphs():
            for node in graph.nodes:
                node.home = graph

    def visit(self, graph: gs.Graph, seen: ChainMap[Hashable, gs.Node]) -> None:
        for node in graph.nodes:
            bodies = list(subgraphs(node))
            for body in bodies:
                self.visit(body, seen.new_child())
            key = None if bodies else self._key(node)
            if key is None:
                continue
            first = seen.setdefault(key, node)
            if first is not node:
                self._merge(first, node)

    def _merge(self, first: gs.Node, node: gs.Node) -> None:
        pairs = [(t, kept) for t, kept in zip(node.outputs, first.outputs, strict=True) if not t.is_empty()]
        for tensor, kept in pairs:
            if id(tensor) in self.outputs and (id(kept) in self.outputs or first.home is not node.home):
                self.change.skip(tensor.name, f"it equals '{kept.name}', but is an output of a graph")
                return
        self.change.sites += [tensor.name for tensor, _ in pairs]
        for tensor, kept in pairs:
            self._alive += [tensor, kept]
            replace_output(tensor, kept, (), self.outputs)
        self.duplicates.append(node)

    def _key(self, node: gs.Node) -> Hashable | None:
        if normal_domain(node.domain) != "" or node.op in _LEFT_ALONE or not node.outputs:
            return None
        if schema_of(node.op, "", self.opset) is None:
            return None
        attributes = []
        for name, value in sorted(node.attrs.items()):
            if value is None or _is_default(value, attribute_default(node.op, "", self.opset, name)):
                continue
            known = _attribute_key(value)
            if known is None:
                return None
            attributes.append((name, known))
        inputs = ["" if t.is_empty() else id(t) for t in node.inputs]
        while inputs and inputs[-1] == "":
            inputs.pop()
        self._alive += node.inputs
        if node.op in COMMUTATIVE:
            inputs.sort(key=str)
        return (node.op, tuple(attributes), tuple(inputs), tuple(t.is_empty() for t in node.outputs))


def _is_default(value: Any, default: Any) -> bool:
    if default is None or isinstance(value, gs.Constant | onnx.AttributeProto):
        return False
    return type(value) is type(default) and bool(np.array_equal(value, default))


def _attribute_key(value: Any) -> Hashable | None:
    if isinstance(value, gs.Constant):
        weight = weight_of(value)
        return (weight.onnx_dtype, weight.shape, weight.digest())
    if isinstance(value, onnx.AttributeProto):
        return bytes(value.SerializeToString(deterministic=True))
    if isinstance(value, list | tuple):
        return tuple((type(item).__name__, item) for item in value)
    if isinstance(value, int | float | str | bytes):
        return (type(value).__name__, value)
    return None
