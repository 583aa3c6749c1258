"""Initializers of equal content become one."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_graphsurgeon as gs

from onnxslim_llm.ir.ownership import is_overridable, owned_constants, subgraphs
from onnxslim_llm.ir.proto.skeleton import GraphSkeleton, skeleton_of
from onnxslim_llm.ir.weights import SparseWeight, Weight, weight_of
from onnxslim_llm.passes.cleanup.content import equal_content, fingerprint
from onnxslim_llm.rewrite.edit import redirect
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["DeduplicateInitializers"]

_Groups = dict[Hashable, list[tuple[gs.Constant, Weight]]]


@dataclass(frozen=True)
class DeduplicateInitializers(Pass):
    """Store initializers of equal type, shape and content once.

    The first one keeps its name. Contents are compared only where type, shape and a sample of the elements agree. An
    initializer of a subgraph gives way to an equal one of a graph around it.

    Before:
        agraph (float[2] x) => (float[2] y)
        <float[2] a = {1, 2}, float[2] b = {1, 2}>
        {
            s = Add (x, a)
            y = Mul (s, b)
        }

    After:
        agraph (float[2] x) => (float[2] y)
        <float[2] a = {1, 2}>
        {
            s = Add (x, a)
            y = Mul (s, a)
        }

    Skips when:
        - the initializer is an output of a graph, or the default of a graph input
        - it has a quantization annotation
        - it is sparse
        - DequantizeLinear reads it: runtimes fuse that with the product behind it only if nobody else reads its inputs
    """

    name: ClassVar[str] = "deduplicate_initializers"
    group: ClassVar[str] = "cleanup"

    def apply(self, model: Model, context: Context) -> Change:
        """Merge the initializers of the top graph and its subgraphs; functions have none."""
        change = Change(detail={"bytes": 0})
        _merge(model.graph, frozenset(), {}, graph_output_ids(model), change)
        return change


def _merge(graph: gs.Graph, outer: frozenset[int], known: _Groups, outputs: set[int], change: Change) -> None:
    annotated = _annotated(graph)
    owned = owned_constants(graph, outer)
    groups: _Groups = {key: list(found) for key, found in known.items()}
    for tensor in owned:
        weight = weight_of(tensor)
        if isinstance(weight, SparseWeight) or id(tensor) in annotated or is_overridable(tensor):
            continue
        if _is_dequantized(tensor):
            continue
        group = groups.setdefault((weight.onnx_dtype, weight.shape, fingerprint(weight)), [])
        twin = next((other for other, content in group if equal_content(content, weight)), None)
        if twin is None:
            group.append((tensor, weight))
        elif id(tensor) in outputs:
            change.skip(tensor.name, f"its content equals that of '{twin.name}', but it is an output of a graph")
        else:
            redirect(tensor, twin)
            change.sites.append(tensor.name)
            change.detail["bytes"] += weight.nbytes
    inner = outer | {id(tensor) for tensor in owned}
    for node in graph.nodes:
        for body in subgraphs(node):
            _merge(body, inner, groups, outputs, change)


def _is_dequantized(tensor: gs.Tensor) -> bool:
    """Return whether DequantizeLinear reads the tensor, as codes, zero points or (through a Cast) scales."""
    return any(
        node.op == "DequantizeLinear" or (node.op == "Cast" and _is_dequantized(node.outputs[0]))
        for node in tensor.outputs
    )


def _annotated(graph: gs.Graph) -> set[int]:
    skeleton: GraphSkeleton | None = skeleton_of(graph, GraphSkeleton)
    if skeleton is None:
        return set()
    return {id(tensor) for _, tensors in skeleton.annotations for tensor in tensors.values()}
