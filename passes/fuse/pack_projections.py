"""Products of one tensor with several weights become one product."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.block_weights import BLOCK_MATMUL, BlockJob, job_of
from onnxslim_llm.concepts.concept import replace_nodes
from onnxslim_llm.concepts.packed_weights import COLUMNS_TOGETHER, PackedBlockJob
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.ownership import is_overridable
from onnxslim_llm.ir.weights import ConcatWeight, SparseWeight, constant, weight_of
from onnxslim_llm.ir.weights.jobs import derive
from onnxslim_llm.rewrite.edit import Builder, detach
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["PackProjections"]

_SPLIT_WITH_INPUT = 13
_FLOATS = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class PackProjections(Pass):
    """Multiply a tensor once by weights laid side by side, instead of once by each: query, key and value; gate and up.

    The weights are concatenated while they are written. Few-bit weights keep their numbers, since each column has its
    own scales. Biases are packed with their products.

    Before:
        Q = MatMul (X, Wq)
        K = MatMul (X, Wk)
        V = MatMul (X, Wv)
    After:
        P = MatMul (X, W_qkv)
        Q, K, V = Split <axis = -1> (P, [256, 64, 64])

    Skips when:
        - the weights have different element types, bits, blocks or other ways of being coded;
        - a weight is used elsewhere, too, so that it would be stored twice;
        - a weight is a graph output, a graph input that the caller may replace, or stored sparse;
        - few-bit weights are no recorded work, because the model was saved half way, or have columns in no
          multiple of 16;
        - there are fewer than `float_products` of them and the weights are floats;
        - `floats` or `quantized` is off and the weights are of that kind.

    Attributes:
        floats: Pack products with float weights.
        float_products: Smallest number of float products that are packed. On ONNX Runtime two of them are as fast
            alone, three save a node; of few-bit weights two already make a step faster
            (benchmarks/packing/projections.py).
        quantized: Pack products with few-bit weights.
    """

    name: ClassVar[str] = "pack_projections"
    group: ClassVar[str] = "fuse"

    floats: bool = True
    float_products: int = 3
    quantized: bool = True

    def __post_init__(self) -> None:
        if self.float_products < 2:
            what = f"float_products must be 2 or more, not {self.float_products}"
            raise UsageError(what, where=self.name, todo="one product cannot be packed")

    def apply(self, model: Model, context: Context) -> Change:
        """Pack what reads the same tensor."""
        change = Change()
        sites = _Sites(model, self)
        replaced: dict[int, list[gs.Node]] = {}
        removed: list[gs.Node] = []  # keeps them alive, so that their ids stay theirs
        for graph in list(model.graphs()):
            for members in sites.groups(graph, change):
                nodes = [member.node for member in members]
                biases = _biases(members, sites.outputs)
                change.sites.append(nodes[0].name or nodes[0].outputs[0].name)
                fresh = _pack(model, members, biases)
                removed += [*nodes, *biases]
                replaced.update({id(node): [] for node in (*nodes, *biases)})
                replaced[id(nodes[0])] = fresh
        replace_nodes(model, replaced)
        return change


@dataclass(frozen=True)
class _Member:
    """A product: its node, and the work behind its codes, or None for floats."""

    node: gs.Node
    job: BlockJob | None

    @property
    def columns(self) -> int:
        return self.job.columns if self.job else int(weight_of(self.node.inputs[1]).shape[1])

    @property
    def kind(self) -> Hashable:
        """Equal for members that fit side by side."""
        if self.job is not None:
            attributes = tuple(sorted(self.node.attrs.items()))
            job = self.job
            return (job.scheme, job.rows, job.layout, job.stored_block, job.accuracy, attributes)
        weight = weight_of(self.node.inputs[1])
        return (weight.onnx_dtype, weight.shape[0])

    @property
    def described(self) -> str:
        if self.job is None:
            return str(weight_of(self.node.inputs[1]).dtype)
        scheme = self.job.scheme
        return f"{scheme.bits} bits in blocks of {scheme.block}"


class _Sites:
    """Finds products that read the same tensor."""

    def __init__(self, model: Model, options: PackProjections) -> None:
        self.options = options
        self.outputs = graph_output_ids(model)
        self._uses: Counter[Hashable] = Counter()
        self._jobs: Counter[Hashable] = Counter()
        for constant_tensor in model.constants():
            self._uses[weight_of(constant_tensor).storage_key] += max(1, len(constant_tensor.outputs))
        for graph in model.graphs():
            for node in graph.nodes:
                if len(node.inputs) > 1 and (job := job_of(node)) is not None:
                    self._jobs[job.identity] += 1

    def groups(self, graph: gs.Graph, change: Change) -> list[list[_Member]]:
        """Return what can be packed, in graph order."""
        readers: dict[int, list[gs.Node]] = defaultdict(list)
        for node in graph.nodes:
            if _is_product(node) and isinstance(node.inputs[0], gs.Variable):
                readers[id(node.inputs[0])].append(node)
        found = []
        for nodes in readers.values():
            if len(nodes) > 1:
                found += self._by_kind(nodes, change)
        return found

    def _by_kind(self, nodes: list[gs.Node], change: Change) -> list[list[_Member]]:
        kinds: dict[Hashable, list[_Member]] = defaultdict(list)
        for node in nodes:
            member, reason = self._member(node)
            if member is None:
                change.skip(node.name or node.outputs[0].name, reason)
            else:
                kinds[member.kind].append(member)
        for members in kinds.values():
            if len(members) == 1 and len(kinds) > 1:
                other = next(m[0] for m in kinds.values() if m is not members)
                reason = f"its weight has {members[0].described}, that of the product beside it {other.described}"
                change.skip(members[0].node.name or members[0].node.outputs[0].name, reason)
        found = []
        for members in kinds.values():
            wanted = self.options.float_products if members[0].job is None else 2
            if len(members) >= wanted:
                found.append(members)
            elif len(members) > 1:
                node = members[0].node
                reason = f"{len(members)} float products, fewer than float_products = {wanted}"
                change.skip(node.name or node.outputs[0].name, reason)
        return found

    def _member(self, node: gs.Node) -> tuple[_Member | None, str]:
        if BLOCK_MATMUL.is_call(node):
            job = job_of(node)
            if job is None:
                return None, "its codes are no recorded work"
            if not self.options.quantized:
                return None, "quantized = false"
            if job.columns % COLUMNS_TOGETHER:
                return None, f"its {job.columns} columns are no multiple of {COLUMNS_TOGETHER}"
            if self._jobs[job.identity] > 1:
                return None, "its weight is used elsewhere, too: it would be stored twice"
            return _Member(node, job), ""
        tensor = node.inputs[1]
        weight = weight_of(tensor)
        if not self.options.floats:
            return None, "floats = false"
        if is_overridable(tensor) or id(tensor) in self.outputs:
            return None, "its weight is a graph input or output, too"
        if isinstance(weight, SparseWeight):
            return None, "its weight is stored sparse"
        if self._uses[weight.storage_key] > 1:
            return None, "its weight is used elsewhere, too: it would be stored twice"
        return _Member(node, None), ""


def _is_product(node: gs.Node) -> bool:
    if BLOCK_MATMUL.is_call(node):
        return True
    if node.op != "MatMul" or normal_domain(node.domain) != "" or not isinstance(node.inputs[1], gs.Constant):
        return False
    weight = weight_of(node.inputs[1])
    return len(weight.shape) == 2 and str(weight.dtype) in _FLOATS


def _biases(members: Sequence[_Member], outputs: set[int]) -> list[gs.Node]:
    """Return the additions of a vector that follow the products, or nothing if they do not follow all of them."""
    found = []
    for member in members:
        product = member.node.outputs[0]
        if len(product.outputs) != 1 or id(product) in outputs:
            return []
        node = product.outputs[0]
        if node.op != "Add" or normal_domain(node.domain) != "":
            return []
        bias = _bias_of(node, product)
        if bias is None or weight_of(bias).shape != (member.columns,):
            return []
        found.append(node)
    return found


def _bias_of(node: gs.Node, product: gs.Tensor) -> gs.Constant | None:
    other = node.inputs[1] if node.inputs[0] is product else node.inputs[0]
    return other if isinstance(other, gs.Constant) and not is_overridable(other) else None


def _pack(model: Model, members: Sequence[_Member], biases: Sequence[gs.Node]) -> list[gs.Node]:
    first = members[0].node
    op = Builder(model, first.name or first.outputs[0].name)
    operand, names = first.inputs[0], [member.node.inputs[1].name for member in members]
    attributes: dict[str, Any] = dict(first.attrs)
    results = [(biases[i] if biases else member.node).outputs[0] for i, member in enumerate(members)]
    widths = [member.columns for member in members]
    bias = None
    if biases:
        vectors = [_bias_of(node, m.node.outputs[0]) for node, m in zip(biases, members, strict=True)]
        bias = np.concatenate([np.asarray(vector.values) for vector in vectors if vector is not None])
    if members[0].job is None:
        packed = ConcatWeight.concatenate([weight_of(member.node.inputs[1]) for member in members], 1)
        weight = constant(model.fresh_name(f"{names[0]}_packed"), packed)
        product = op.MatMul(operand, weight)
    else:
        job = PackedBlockJob([member.job for member in members if member.job is not None])
        old = [tensor.name for tensor in first.inputs[1:] if isinstance(tensor, gs.Constant)]
        codes: list[gs.Tensor | None] = [
            constant(model.fresh_name(f"{name}_packed"), w) for name, w in zip(old, derive(job), strict=True)
        ]
        codes += [None] * (len(first.inputs) - 1 - len(codes))
        product = BLOCK_MATMUL.build(op, operand, *codes, **attributes)
    for node in (*(member.node for member in members), *biases):
        detach(node)
    product.dtype = results[0].dtype
    product.shape = None if results[0].shape is None else [*results[0].shape[:-1], sum(widths)]
    if bias is not None:
        product = op.Add(product, op.constant(bias, f"{results[0].name}_bias"))
    if (model.opset() or 0) >= _SPLIT_WITH_INPUT:
        op.call("", "Split", product, np.array(widths, np.int64), axis=-1, _outputs=len(widths))
    else:
        op.call("", "Split", product, axis=-1, split=widths, _outputs=len(widths))
    split = op.nodes[-1]
    for i, result in enumerate(results):
        split.outputs[i] = result
    return op.nodes
