"""Nodes whose inputs are all known are computed now."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto

from onnxslim_llm.ir.shapes import ensure_shapes
from onnxslim_llm.ir.weights import SparseWeight, Weight, constant, dtypes, weight_of
from onnxslim_llm.passes.cleanup.lazy_fold import lazy_fold
from onnxslim_llm.rewrite.constants import constant_tensor
from onnxslim_llm.rewrite.edit import redirect, remove_dead
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.evaluate import FOLDABLE, GENERATORS, evaluate
from onnxslim_llm.rewrite.facts import known_shape
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["FoldConstants"]

#: Weights from this size on are never computed on at once: what happens to them is recorded and done at save.
LAZY_BYTES = 64 << 10
#: Results whose size is not known beforehand are computed only from inputs with so few elements together.
UNPREDICTED_ELEMENTS = 4096
_BYTE = 8

#: Bytes that a Cast takes, with its names: more of them are not saved by leaving it out.
_WORTH_A_CAST = 256


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute nodes whose inputs are all constants, unless the result would make the file grow.

    Transpose, Reshape, Squeeze, Unsqueeze and narrowing Cast of large weights are recorded and done while the artifact
    is written. Everything else that is computed is small.

    Before:
        agraph (float[N] x) => (float[N] y)
        <float a = {2.0}, float b = {3.0}>
        {
            c = Mul (a, b)
            y = Add (x, c)
        }

    After:
        agraph (float[N] x) => (float[N] y)
        <float c = {6.0}>
        {
            y = Add (x, c)
        }

    Skips when:
        - the result would be more than `max_growth` bytes larger than the constants that go (masks, tables, Expand), or
          for a Cast more than the node itself takes: who stored scales in float16 knew why
        - the operator quantizes, dequantizes, is random, has a subgraph, or is not of the standard domain
        - it computes on a large weight in any other way than those above, or on a shared one
        - the constant is quantized to less than a byte, sparse, or of strings
        - the result is an output of a graph
    """

    name: ClassVar[str] = "fold_constants"
    group: ClassVar[str] = "cleanup"

    max_growth: int = 1024

    def apply(self, model: Model, context: Context) -> Change:
        """Fold the top graph and its subgraphs."""
        change = Change()
        outputs = graph_output_ids(model)
        typed = False
        opset = model.opset() or 1
        for graph in model.graphs():
            for node in graph.nodes:
                if normal_domain(node.domain) != "" or node.op not in FOLDABLE or not node.inputs:
                    continue
                if any(not t.is_empty() and constant_tensor(t) is None for t in node.inputs):
                    continue
                if not typed:
                    ensure_shapes(model)
                    typed = True
                done = self._fold(node, outputs, opset)
                if isinstance(done, str):
                    change.skip(node.outputs[0].name, done)
                    continue
                for tensor, weight in zip(list(node.outputs), done, strict=True):
                    if not tensor.is_empty():
                        redirect(tensor, constant(tensor.name, weight))
                        change.sites.append(tensor.name)
        if change:
            gone = {id(n) for n in remove_dead((n for g in model.graphs() for n in g.nodes), outputs)}
            for graph in model.graphs():
                graph.nodes[:] = [node for node in graph.nodes if id(node) not in gone]
        return change

    def _fold(self, node: gs.Node, outputs: set[int], opset: int) -> list[Weight] | str:
        """Return the weights that take the place of the node's outputs, or why it is left alone."""
        if any(id(t) in outputs for t in node.outputs):
            return "its result is an output of the graph"
        sources = {id(c): c for c in (constant_tensor(t) for t in node.inputs) if c is not None}
        weights = [weight_of(c) for c in sources.values()]
        for weight in weights:
            reason = _untouchable(weight)
            if reason:
                return reason
        if max(weight.nbytes for weight in weights) >= LAZY_BYTES:
            first = constant_tensor(node.inputs[0])
            if first is None or weight_of(first).nbytes < LAZY_BYTES or len(node.outputs) != 1:
                return "it computes on a large weight"
            folded = lazy_fold(node, weight_of(first), _is_shared(first, node), known_shape(node.outputs[0]))
            return folded if isinstance(folded, str) else [folded]
        size = _predicted_bytes(node)
        if size is None:
            if node.op in GENERATORS or sum(weight.size for weight in weights) > UNPREDICTED_ELEMENTS:
                return "the size of its result is not known"
        else:
            freed = sum(weight_of(c).nbytes for c in sources.values() if not _is_shared(c, node))
            limit = min(self.max_growth, _WORTH_A_CAST) if node.op == "Cast" else self.max_growth
            if size - freed > limit:
                return f"its result would make the file {size - freed} bytes larger"
        results = evaluate(node, [None if t.is_empty() else _load(t) for t in node.inputs], opset)
        if results is None or len(results) != len(node.outputs):
            return "the reference implementation cannot compute it"
        return [weight_of(constant("", result)) for result in results]


def _load(tensor: gs.Tensor) -> NDArray[Any]:
    source = constant_tensor(tensor)
    assert source is not None
    return weight_of(source).load()


def _untouchable(weight: Weight) -> str:
    if isinstance(weight, SparseWeight):
        return "it reads a sparse tensor"
    if weight.onnx_dtype == TensorProto.STRING:
        return "it reads strings"
    if dtypes.numpy_dtype(weight.onnx_dtype) is None or dtypes.bits_of(weight.onnx_dtype) < _BYTE:
        return "it reads a quantized tensor"
    return ""


def _is_shared(tensor: gs.Constant, node: gs.Node) -> bool:
    return any(user is not node for user in tensor.outputs)


def _predicted_bytes(node: gs.Node) -> int | None:
    """Return the bytes of all outputs together, or None if they are not known before the node is computed."""
    total = 0
    for tensor in node.outputs:
        if tensor.is_empty():
            continue
        shape = known_shape(tensor)
        if shape is None or tensor.dtype is None:
            return None
        total += math.prod(shape) * dtypes.bits_of(dtypes.onnx_dtype(tensor.dtype)) // _BYTE
    return total
