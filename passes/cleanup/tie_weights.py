"""A matrix that is stored a second time, transposed, is stored once."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.ir.ownership import is_overridable, owned_constants
from onnxslim_llm.ir.weights import SparseWeight, Weight, weight_of
from onnxslim_llm.passes.cleanup.content import equal_transposed, fingerprint
from onnxslim_llm.rewrite.edit import redirect
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["TieWeights"]

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_Matrix = tuple[gs.Constant, Weight]


@dataclass(frozen=True)
class TieWeights(Pass):
    """Store a matrix and its transposed copy once, as TorchScript exports lack for tied embeddings.

    The copy that a Gather reads stays, or else the first one. The users of the other one read it through a Transpose,
    or with the other transB where they are Gemm.

    Before:
        agraph (int64[N] ids, float[N, 2] h) => (float[N, 2] e, float[N, 3] y)
        <float[3, 2] table = {1, 2, 3, 4, 5, 6}, float[2, 3] head = {1, 3, 5, 2, 4, 6}>
        {
            e = Gather (table, ids)
            y = MatMul (h, head)
        }

    After:
        agraph (int64[N] ids, float[N, 2] h) => (float[N, 2] e, float[N, 3] y)
        <float[3, 2] table = {1, 2, 3, 4, 5, 6}>
        {
            e = Gather (table, ids)
            t = Transpose <perm = [1, 0]> (table)
            y = MatMul (h, t)
        }

    Skips when:
        - the matrix is smaller than `min_bytes`: a Transpose would cost more than it saves
        - it is quantized: runtimes look for the weight right behind DequantizeLinear
        - it is an output of a graph, or the default of a graph input
    """

    name: ClassVar[str] = "tie_weights"
    group: ClassVar[str] = "cleanup"

    min_bytes: int = 4096

    def apply(self, model: Model, context: Context) -> Change:
        """Tie the matrices of the top graph."""
        change = Change(detail={"bytes": 0})
        fixed = graph_output_ids(model)
        matrices: list[_Matrix] = []
        transposed: dict[Hashable, list[_Matrix]] = {}
        for tensor in owned_constants(model.graph):
            weight = weight_of(tensor)
            if len(weight.shape) != 2 or weight.onnx_dtype not in _FLOATS or weight.nbytes < self.min_bytes:
                continue
            if isinstance(weight, SparseWeight) or is_overridable(tensor) or id(tensor) in fixed:
                continue
            matrices.append((tensor, weight))
            key = (weight.onnx_dtype, weight.shape[::-1], fingerprint(weight, transposed=True))
            transposed.setdefault(key, []).append((tensor, weight))
        gone: set[int] = set()
        for kept, weight in sorted(matrices, key=lambda matrix: not _is_table(matrix[0])):
            for other, copy in transposed.get((weight.onnx_dtype, weight.shape, fingerprint(weight)), []):
                if other is kept or id(kept) in gone or id(other) in gone or not equal_transposed(weight, copy):
                    continue
                _tie(model, kept, other)
                statistics = context.statistics
                if statistics is not None and statistics.of_weight(kept.name) is None:
                    context.statistics = statistics.changed(kept.name, origin=other.name)
                gone.add(id(other))
                change.sites.append(other.name)
                change.detail["bytes"] += copy.nbytes
        return change


def _is_table(tensor: gs.Constant) -> bool:
    """Return whether rows are gathered from a matrix: then it should be the one that stays."""
    return any(node.op == "Gather" and node.inputs[0] is tensor for node in tensor.outputs)


def _tie(model: Model, kept: gs.Constant, other: gs.Constant) -> None:
    for node in list(other.outputs):
        if node.op == "Gemm" and normal_domain(node.domain) == "" and node.inputs[1] is other:
            others = [t for i, t in enumerate(node.inputs) if i != 1]
            if all(t is not other for t in others):
                node.inputs[1] = kept
                node.attrs["transB"] = 1 - int(node.attrs.get("transB", 0))
    if not other.outputs:
        return
    flipped = gs.Variable(model.fresh_name(f"{kept.name}_transposed"), other.dtype, list(other.shape))
    flipped.inferred = True
    first = _first_reader(model.graph, other)
    redirect(other, flipped)
    name = model.fresh_name(f"{kept.name}/Transpose")
    model.graph.nodes.insert(first, gs.Node("Transpose", name, {"perm": [1, 0]}, [kept], [flipped]))


def _first_reader(graph: gs.Graph, tensor: gs.Tensor) -> int:
    users = {id(node) for node in tensor.outputs}
    for i, node in enumerate(graph.nodes):
        inner = (n for body in node.subgraphs(recursive=True) for n in body.nodes)
        if id(node) in users or any(id(n) in users for n in inner):
            return i
    return 0
