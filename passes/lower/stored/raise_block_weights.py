"""Few-bit weights that a model already holds become concepts, so that any target can be made of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.concepts.block_weights import BLOCK_GATHER, BLOCK_MATMUL, BlockJob
from onnxslim_llm.concepts.concept import follow_opset, replace_nodes
from onnxslim_llm.custom_ops import ops
from onnxslim_llm.ir.opset import convert_opset
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.ir.weights import constant, dtypes
from onnxslim_llm.ir.weights.jobs import derive
from onnxslim_llm.passes.lower.stored.stored_nodes import ORT_DOMAIN, StoredNode, read_stored
from onnxslim_llm.rewrite.edit import Builder, detach, remove_dead
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["RaiseBlockWeights"]

#: (opset, IR version) that brought the element types of codes.
_NEEDS = {2: (25, 13), 3: (21, 10), 4: (21, 10), 8: (21, 10)}
_GATE = "_gate"


@dataclass(frozen=True)
class RaiseBlockWeights(Pass):
    """Take few-bit products and look-ups of ONNX Runtime's and of our own operators in, with their exact codes.

    So a model of another compiler can be lowered to any target, and an artifact of ours can be lowered to another one.
    The precision that a product asks for goes with it.

    Before:
        Y = com.microsoft.MatMulNBits <K, N, bits = 4, block_size = 32> (X, W_q4, W_scale)
    After:
        Y = onnxslim_llm.BlockMatMul <block_size = 32, scale_type = 1> (X, W_q4, W_scale, )

    Skips when:
        - codes, scales or zero points are no initializers, or may be replaced by the caller;
        - zero points are floats, or columns are permuted (g_idx);
        - scales are neither float32 nor float16;
        - the sizes of weight and attributes do not fit together;
        - a look-up reads codes with an element type of their own instead of bytes, or along another axis;
        - codes are rearranged for one runtime (weight_prepacked);
        - the weight is stored sparse (`store_sparse`), and the target has the operators that read it so.

    Attributes:
        runtime_operators: Take in com.microsoft's operators, too, not only our own.
    """

    name: ClassVar[str] = "raise_block_weights"
    group: ClassVar[str] = "lower"

    runtime_operators: bool = True

    def apply(self, model: Model, context: Context) -> Change:
        """Replace the nodes; nothing is read but headers."""
        change = Change()
        found = list(self._find(model, context, change))
        if not found:
            return change
        opset, ir_version = (max(n) for n in zip(*(_NEEDS[s.job(0).scheme.bits] for _, s in found), strict=True))
        if (model.opset() or 0) < opset:
            convert_opset(model, opset)
            follow_opset(model)
            change = Change(detail={"converted_to_opset": opset})
            found = list(self._find(model, context, change))
        model.graph.ir_version = max(model.graph.ir_version or 0, ir_version)
        _Raising(model, change).replace(found)
        _drop_unused_imports(model)
        return change

    def _find(self, model: Model, context: Context, change: Change) -> Iterator[tuple[gs.Graph, StoredNode]]:
        domains = {ops.DOMAIN, ORT_DOMAIN} if self.runtime_operators else {ops.DOMAIN}
        if not any(node.domain in domains for graph in model.graphs() for node in graph.nodes):
            return
        ops.register_schemas()
        infer_shapes(model)
        for graph in model.graphs():
            for node in graph.nodes:
                stored, reason = read_stored(node) if node.domain in domains else (None, "")
                if stored is not None and stored.is_sparse and _reads_sparse(context):
                    change.skip(node.name or node.outputs[0].name, "it is stored sparse, as the target takes it")
                elif stored is not None:
                    yield graph, stored
                elif reason:
                    change.skip(node.name or node.outputs[0].name, reason)


def _reads_sparse(context: Context) -> bool:
    return context.target is not None and ops.DOMAIN in context.target.domains


def _drop_unused_imports(model: Model) -> None:
    used = {node.domain for graph in model.all_graphs() for node in graph.nodes}
    imports = model.graph.import_domains
    imports[:] = [item for item in imports if item.domain not in (ops.DOMAIN, ORT_DOMAIN) or item.domain in used]


@dataclass
class _Raising:
    """Puts concepts into the graphs, all of them at the end."""

    model: Model
    change: Change
    replaced: dict[int, list[gs.Node]] = field(default_factory=dict)
    _constants: dict[Hashable, list[gs.Constant | None]] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)
    _removed: list[gs.Node] = field(default_factory=list)  # keeps them alive, so that their ids stay theirs

    def replace(self, found: list[tuple[gs.Graph, StoredNode]]) -> None:
        outputs = graph_output_ids(self.model)
        before = [list(stored.node.inputs) for _, stored in found]
        results = [stored.result for _, stored in found]
        for _, stored in found:
            for old in (stored.node, *stored.absorbed):
                detach(old)
                self._removed.append(old)
                self.replaced[id(old)] = []
        self._taken |= {tensor.name for inputs in before for tensor in inputs if tensor.outputs}  # others read it
        for (graph, stored), inputs, result in zip(found, before, results, strict=True):
            op = Builder(self.model, stored.node.name or result.name)
            value = self._look_up(op, graph, stored) if stored.is_gather else self._multiply(op, graph, stored)
            assert op.nodes[-1].outputs[0] is value
            op.nodes[-1].outputs[0] = result
            self.replaced[id(stored.node)] = op.nodes
            self.change.sites.append(stored.node.name or result.name)
            producers = [tensor.inputs[0] for tensor in inputs if isinstance(tensor, gs.Variable) and tensor.inputs]
            for dead in remove_dead(producers, outputs):  # conversions of scales
                self._removed.append(dead)
                self.replaced[id(dead)] = []
        replace_nodes(self.model, self.replaced)

    def _look_up(self, op: Builder, graph: gs.Graph, stored: StoredNode) -> gs.Tensor:
        codes = self._codes(graph, stored, stored.job(0))
        value: gs.Tensor = BLOCK_GATHER.build(op, stored.operand, *codes, **_attributes(stored))
        op.nodes[-1].name = _name(stored)
        return value

    def _multiply(self, op: Builder, graph: gs.Graph, stored: StoredNode) -> gs.Tensor:
        products = [self._product(op, graph, stored, half) for half in range(stored.halves)]
        value = _activated(op, stored.activation.removesuffix(_GATE), products[0])
        if len(products) == 2:
            value = op.Mul(value, products[1])
        return value if stored.residual is None else op.Add(value, stored.residual)

    def _product(self, op: Builder, graph: gs.Graph, stored: StoredNode, half: int) -> gs.Tensor:
        job = stored.job(half)
        codes = self._codes(graph, stored, job)
        value: gs.Tensor = BLOCK_MATMUL.build(op, stored.operand, *codes, **_attributes(stored))
        if stored.halves == 1:
            op.nodes[-1].name = _name(stored)
        own = slice(half * job.columns, (half + 1) * job.columns)
        if stored.low_rank is not None:
            u, v = stored.low_rank
            v = v if stored.halves == 1 else op.Slice(v, [own.start], [own.stop], [1])
            correction = op.MatMul(op.MatMul(_in_type(op, stored.operand, TensorProto.FLOAT), u), v)
            value = op.Add(value, _in_type(op, correction, stored.compute_type))
        if stored.bias is not None:
            bias = stored.bias if stored.halves == 1 else op.Slice(stored.bias, [own.start], [own.stop], [0])
            value = op.Add(value, bias)
        return value

    def _codes(self, graph: gs.Graph, stored: StoredNode, job: BlockJob) -> list[gs.Constant | None]:
        """Return the constants of a weight: the same ones in one graph."""
        key = (id(graph), job.key)
        if key not in self._constants:
            weights = derive(job)
            made: list[gs.Constant | None] = [
                constant(self._free(name), weight) for name, weight in zip(stored.names, weights, strict=False)
            ]
            self._constants[key] = [*made, *[None] * (3 - len(made))]
        return self._constants[key]

    def _free(self, name: str) -> str:
        """Return the name of what the new constant takes the place of, unless another one has it already."""
        while name in self._taken:
            name = self.model.fresh_name(name)
        self._taken.add(name)
        return name


def _attributes(stored: StoredNode) -> dict[str, Any]:
    return {"block_size": stored.job(0).stored_block, "scale_type": stored.compute_type}


def _name(stored: StoredNode) -> str:
    """Return a name without what lowering appends, so that names do not grow with every compile."""
    node = stored.node
    return str(node.name).removesuffix(f"/{node.op}") if node.name else ""


def _in_type(op: Builder, tensor: gs.Tensor, wanted: int) -> gs.Tensor:
    if tensor.dtype is not None and dtypes.onnx_dtype(tensor.dtype) == wanted:
        return tensor
    return op.Cast(tensor, to=wanted)


def _activated(op: Builder, activation: str, value: gs.Tensor) -> gs.Tensor:
    if activation == "silu":
        return op.Mul(value, op.Sigmoid(value))
    if activation in ("gelu", "gelu_tanh"):
        return op.Gelu(value, approximate="tanh" if activation == "gelu_tanh" else "none")
    assert activation == "none", activation
    return value
