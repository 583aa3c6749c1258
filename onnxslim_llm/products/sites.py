"""Where a model reads float matrices that could be stored in few bits."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import onnx_graphsurgeon as gs

from onnxslim_llm.ir.ownership import is_overridable
from onnxslim_llm.ir.roles import constant_roles
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.ir.weights.sparse import SparseWeight
from onnxslim_llm.ir.weights.weight import Weight
from onnxslim_llm.products.attention import AttentionFlow, Sensitive
from onnxslim_llm.products.reads import (
    QUANTIZED,
    WeightRead,
    gather_reason,
    k_axis_of,
    product_reason,
    quantized_operand,
    quantized_source,
    read_weight,
)
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.passes import Change

__all__ = ["Site", "WeightGroup", "find_groups"]

#: A product with fewer rows or columns than this is a gate or a router: small, sensitive, and too short for a block.
SMALLEST_SIDE = 16

Role = Literal["embedding", "lm_head", "linear"]
ComputeType = Literal["float32", "float16"]

_FLOATS = ("float32", "float16", "bfloat16")
_COMPUTED_IN = ("float32", "float16")
_OVERRIDABLE = "it is a graph input, too: whoever runs the model may replace it"


@dataclass(frozen=True)
class Site:
    """A node that reads a matrix.

    Attributes:
        node: A MatMul, Gemm or Gather.
        graph: Where it is.
        computes_in: Element type of the activations, "float32" or "float16".
        role: "embedding", "lm_head", or "linear" for all other products.
        sensitive: In which ways a "linear" product needs more bits than others; see `attention`.
    """

    node: gs.Node
    graph: gs.Graph
    computes_in: ComputeType
    role: Role
    sensitive: frozenset[Sensitive] = frozenset()


@dataclass
class WeightGroup:
    """All sites that read one matrix along the same axis, and so can share one set of codes.

    Attributes:
        name: Name of the initializer.
        source: Its content.
        k_axis: The axis of `source` that products sum over; the embedding axis of a table.
        sites: The readers, in graph order.
    """

    name: str
    source: Weight
    k_axis: int
    sites: list[Site] = field(default_factory=list)

    @property
    def roles(self) -> set[str]:
        """What the matrix is used as."""
        return {site.role for site in self.sites}

    @property
    def sensitive(self) -> frozenset[Sensitive]:
        """In which ways it needs more bits than others."""
        return frozenset().union(*(site.sensitive for site in self.sites))

    @property
    def rows(self) -> int:
        """K."""
        return self.source.shape[self.k_axis]

    @property
    def columns(self) -> int:
        """N."""
        return self.source.shape[1 - self.k_axis]


def find_groups(model: Model, change: Change) -> list[WeightGroup]:
    """Return the matrices that can be quantized; `change` is told which ones cannot, and why."""
    search = _Search(model, change)
    for graph in model.graphs():
        for node in graph.nodes:
            if normal_domain(node.domain) == "" and node.op in ("MatMul", "Gemm", "Gather"):
                search.visit(node, graph)
            elif (codes := quantized_operand(node)) is not None:
                change.skip(codes.name, QUANTIZED)
    for function in model.functions:
        for node in function.nodes:
            if node.op == "Constant" and _is_matrix(node.attrs.get("value")):
                where = f"{function.domain}::{function.name}/{node.outputs[0].name}"
                change.skip(where, "it lies inside of a model-local function: inline the function first")
    return search.result()


def _is_matrix(value: object) -> bool:
    return isinstance(value, gs.Constant) and len(weight_of(value).shape) == 2


class _Search:
    def __init__(self, model: Model, change: Change) -> None:
        self.model = model
        self.change = change
        self.groups: dict[Hashable, WeightGroup] = {}
        self.constants: dict[Hashable, dict[int, gs.Constant]] = {}
        self.roles = {id(constant): role for constant, role in constant_roles(model)}
        self.outputs = {id(tensor) for graph in model.graphs() for tensor in graph.outputs}
        self.told: set[tuple[str, str]] = set()
        self.products: set[int] = set()
        self.flows: dict[int, AttentionFlow] = {}

    def visit(self, node: gs.Node, graph: gs.Graph) -> None:
        if len(node.inputs) < 2:
            return
        index = 0 if node.op == "Gather" else 1
        read = read_weight(node.inputs[index])
        if read is None:
            self._explain(node, index)
            return
        self.products.add(id(node))
        weight = weight_of(read.constant)
        if len(weight.shape) < 2 or str(weight.dtype) not in (*_FLOATS, "float64"):
            return  # vectors, shapes and codes are no weights
        reason = gather_reason(node, weight) if node.op == "Gather" else product_reason(node, weight)
        role = self.roles.get(id(read.constant), "other")
        if not reason and node.op == "Gather" and role != "embedding":
            reason = "its rows reach the attention as they are: positions or biases, no embedding of tokens"
        reason = reason or self._reason(read, weight)
        if reason:
            self._skip(read.constant.name, reason)
            return
        k_axis = k_axis_of(node, read.transposed)
        if min(weight.shape) < SMALLEST_SIDE:
            k, n = weight.shape[k_axis], weight.shape[1 - k_axis]
            self._skip(read.constant.name, f"K = {k} and N = {n}: a side below {SMALLEST_SIDE} is left as it is")
            return
        key = (weight.key, k_axis)
        group = self.groups.setdefault(key, WeightGroup(read.constant.name, weight, k_axis))
        # A product with an embedding table is a tied classifier.
        product: Role = "lm_head" if role in ("lm_head", "embedding") else "linear"
        computes_in: ComputeType = "float16" if read.dtype == "float16" else "float32"
        group.sites.append(Site(node, graph, computes_in, "embedding" if node.op == "Gather" else product))
        self.constants.setdefault(key, {})[id(read.constant)] = read.constant

    def _skip(self, where: str, reason: str) -> None:
        if (where, reason) not in self.told:  # a rotary table is looked up in every layer
            self.told.add((where, reason))
            self.change.skip(where, reason)

    def _explain(self, node: gs.Node, index: int) -> None:
        codes = quantized_source(node.inputs[index])
        if codes is not None:
            self._skip(codes.name, QUANTIZED)
        elif node.op != "Gather":
            left = read_weight(node.inputs[0])
            if left is not None and len(weight_of(left.constant).shape) == 2:
                self._skip(left.constant.name, "it is the left operand: blocks would run across rows")

    def _reason(self, read: WeightRead, weight: Weight) -> str:
        if read.in_node:
            return "it lies in a Constant node: clean the model up first"
        if isinstance(weight, SparseWeight):
            return "it is stored sparse"
        if str(weight.dtype) not in _FLOATS:
            return f"its type is {weight.dtype}"
        if read.dtype not in _COMPUTED_IN:
            return f"it is used in {read.dtype}, which runtimes cannot dequantize to"
        if is_overridable(read.constant):
            return _OVERRIDABLE
        if id(read.constant) in self.outputs:
            return "it is a graph output, too"
        return ""

    def result(self) -> list[WeightGroup]:
        """Return the groups without those whose float copy would have to stay for another reader."""
        accepted = {id(site.node) for group in self.groups.values() for site in group.sites}
        found = []
        for key, group in self.groups.items():
            others = (o for c in self.constants[key].values() for o in self._other_readers(c, accepted))
            other = next(others, None)
            if other is None:
                group.sites = [self._judged(site) for site in group.sites]
                found.append(group)
            else:
                self._skip(group.name, f"{other} reads it, too, as floats: it would be stored twice")
        return found

    def _judged(self, site: Site) -> Site:
        if site.role != "linear":
            return site
        if id(site.graph) not in self.flows:
            self.flows[id(site.graph)] = AttentionFlow(site.graph, self.products)
        return replace(site, sensitive=frozenset(self.flows[id(site.graph)].kinds(site.node)))

    def _other_readers(self, tensor: gs.Tensor, accepted: set[int]) -> Iterator[str]:
        if id(tensor) in self.outputs:
            yield "a graph output"
        for node in tensor.outputs:
            if id(node) in accepted:
                continue
            if node.op in ("Transpose", "Cast", "Identity") and normal_domain(node.domain) == "":
                yield from self._other_readers(node.outputs[0], accepted)
            else:
                yield f"{node.op} '{node.name or node.outputs[0].name}'"
