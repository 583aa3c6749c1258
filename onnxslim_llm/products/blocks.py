"""The blocks of a transformer: parts x' = x + f(x) of its residual stream with one attention each.

All that goes from the embedding to the model's answer passes through the residual stream. Where everything passes
through one node, the model can be cut; the nodes that dominate the answer (`networkx.immediate_dominators`) are those
places. Two cuts with an addition of what lay between to what was there before enclose a part that can be left out.
Told from the flow of data; names are never read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import networkx as nx
import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.attention import is_attention
from onnxslim_llm.ir.roles import constant_roles
from onnxslim_llm.ir.shapes import shape_of
from onnxslim_llm.ir.topology import digraph
from onnxslim_llm.products.attention import is_core
from onnxslim_llm.products.caches import Cache, caches_of
from onnxslim_llm.rewrite.constants import constant_tensor
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.passes import Change

__all__ = ["ResidualBlock", "find_blocks"]

_WATCHERS = frozenset({"Shape", "Size"})
_SINK = -1  # the model's answer, as a vertex of the flow
_CROSS = "it attends to something else than what is in the residual stream"


@dataclass
class ResidualBlock:
    """One attention and all that follows it until the next one: x' = x + f(x).

    Attributes:
        before: x.
        after: x'.
        attention: The attention.
        nodes: All nodes that depend on x, but not on x'.
        caches: Of the attention; none without a cache.
    """

    before: gs.Variable
    after: gs.Variable
    attention: gs.Node
    nodes: list[gs.Node] = field(default_factory=list)
    caches: list[Cache] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the attention."""
        return str(self.attention.name or self.attention.outputs[0].name)


def find_blocks(model: Model, change: Change) -> list[ResidualBlock]:
    """Return the blocks of the top graph that can be left out, in order.

    Args:
        model: The model, with inferred shapes and sorted nodes.
        change: Told of what looks like a block and is none, and why.
    """
    start = _embedding(model)
    if start is None:
        change.skip("the model", "no table of token embeddings is looked up")
        return []
    search = _Search(model, start)
    found = []
    for steps, behind in search.candidates():
        block = search.block(steps, behind)
        if isinstance(block, ResidualBlock):
            found.append(block)
        else:
            change.skip(steps[0].name, block)
    if any(skip.reason == _CROSS for skip in change.skipped):
        for block in found:
            change.skip(block.name, "it is half of a block: the model attends to another one, too")
        return []
    if not found and not change.skipped:
        change.skip("the model", "no attention stands between two places of a residual stream")
    return found


def _embedding(model: Model) -> int | None:
    """Return the position of the first node that looks up tokens."""
    tables = {id(constant) for constant, role in constant_roles(model) if role == "embedding"}
    for position, node in enumerate(model.graph.nodes):
        if normal_domain(node.domain) == "" and node.op == "Gather" and id(node.inputs[0]) in tables:
            return position
    return None


@dataclass
class _Step:
    """From one cut of the model to the next.

    Attributes:
        first, last: Positions of the nodes that are the cuts.
        cores: Attentions between.
        adds: Whether the step adds something to what was there before.
        keeps: Whether it only changes names and axes of tokens.
        name: Of what ends it.
    """

    first: int
    last: int
    cores: list[gs.Node]
    adds: bool
    keeps: bool
    name: str


class _Search:
    def __init__(self, model: Model, start: int) -> None:
        self.model, self.nodes = model, model.graph.nodes
        self.outputs = {id(tensor) for graph in model.graphs() for tensor in graph.outputs}
        flow = digraph(model.graph)
        flow.remove_edges_from([(a, b) for a, b in flow.edges if self.nodes[b].op in _WATCHERS])
        inside = nx.descendants(flow, start) | {start}
        self.flow: nx.DiGraph = flow.subgraph(inside).copy()
        self.flow.add_edges_from((position, _SINK) for position in self._answers(inside))
        self.start = start

    def _answers(self, inside: set[int]) -> list[int]:
        """Return the makers of the outputs that depend on most attentions; what attentions return as caches is none."""
        depth: dict[int, int] = {}
        for position in sorted(inside):  # nodes are sorted
            before = max((depth[p] for p in self.flow.predecessors(position)), default=0)
            depth[position] = before + is_core(self.nodes[position])
        made = {p for p in inside for i, t in enumerate(self.nodes[p].outputs) if self._is_answer(p, i, t)}
        deepest = max((depth[p] for p in made), default=0)
        return [p for p in made if depth[p] == deepest]

    def _is_answer(self, position: int, index: int, tensor: gs.Tensor) -> bool:
        node = self.nodes[position]
        while node.op in ("Cast", "Identity") and node.inputs[0].inputs:
            tensor_before, node = node.inputs[0], node.inputs[0].inputs[0]
            index = next(i for i, t in enumerate(node.outputs) if t is tensor_before)
        return id(tensor) in self.outputs and not (is_core(node) and index > 0)

    def candidates(self) -> Iterator[tuple[list[_Step], _Step | None]]:
        """Yield the steps of each block, and the one that follows them."""
        steps = list(self._steps())
        begins = [i for i, step in enumerate(steps) if step.cores]
        last_sum = max((i for i, step in enumerate(steps) if step.adds), default=-1)
        for begin in begins:
            end = begin + 1
            while end < len(steps) and not steps[end].cores and (steps[end].adds or steps[end].keeps):
                end += 1
            inner = end < len(steps) and end <= last_sum and not steps[end].cores
            yield steps[begin:end], steps[end] if inner else None

    def _steps(self) -> Iterator[_Step]:
        if _SINK not in self.flow:
            return
        dominators = nx.immediate_dominators(self.flow, self.start)
        cuts, vertex = [], dominators[_SINK]
        while vertex != self.start:
            cuts.append(vertex)
            vertex = dominators[vertex]
        cuts = [self.start, *reversed(cuts)]
        behind = {cut: nx.descendants(self.flow, cut) for cut in cuts}
        for first, last in itertools.pairwise(cuts):
            between = behind[first] - behind[last] - {last}
            cores = [self.nodes[p] for p in sorted(between | {last}) if is_core(self.nodes[p])]
            node = self.nodes[last]
            adds = self._adds(first, last)
            yield _Step(
                first, last, cores, adds, not adds and self._keeps(node), str(node.name or node.outputs[0].name)
            )

    def _adds(self, first: int, last: int) -> bool:
        """Return whether the last node is a sum of what the first one makes and something else."""
        stack, start = [self.nodes[last]], self.nodes[first]
        sums = False
        while stack:
            node = stack.pop()
            if node is start:
                return sums
            if normal_domain(node.domain) == "" and node.op == "Add":
                operands = [t for t in node.inputs if constant_tensor(t) is None]
                sums = sums or len(operands) == 2
            elif normal_domain(node.domain) == "" and node.op == "Identity":
                operands = [node.inputs[0]]
            else:
                continue
            stack += [t.inputs[0] for t in operands if t.inputs]
        return False

    def _keeps(self, node: gs.Node) -> bool:
        if normal_domain(node.domain) != "" or node.op not in ("Identity", "Reshape"):
            return False
        shapes = [node.inputs[0].shape, node.outputs[0].shape]
        return all(shape and isinstance(shape[-1], int) for shape in shapes) and shapes[0][-1] == shapes[1][-1]

    def block(self, steps: Sequence[_Step], behind: _Step | None) -> ResidualBlock | str:
        """Return what some steps are together, or why they are no block."""
        cores = [core for step in steps for core in step.cores]
        if not all(step.adds for step in steps if not step.keeps):
            return "what follows its attention is not added to what was there before"
        if behind is not None:
            node = self.nodes[behind.last]
            return f"{node.op} '{behind.name}' stands in the residual stream behind it"
        if len(cores) != 1:
            return f"{len(cores)} attentions work side by side"
        while len(steps) > 1 and (steps[-1].keeps and not self._same(steps)):
            steps = steps[:-1]
        if not self._same(steps):
            return "its result has another shape or type than what it begins with"
        before, after = self.nodes[steps[0].first].outputs[0], self.nodes[steps[-1].last].outputs[0]
        last = steps[-1].last
        inner = nx.descendants(self.flow, steps[0].first) - nx.descendants(self.flow, last) - {last, _SINK}
        block = ResidualBlock(before, after, cores[0], [self.nodes[p] for p in sorted(inner)])
        return self._caches(block) or self._leaks(block, inner, last) or block

    def _same(self, steps: Sequence[_Step]) -> bool:
        """Return whether the ends have the same type and axes; sizes that additions keep need not be known."""
        before, after = self.nodes[steps[0].first].outputs[0], self.nodes[steps[-1].last].outputs[0]
        first, last = shape_of(before), shape_of(after)
        if not first or not last or len(first) != len(last) or before.dtype != after.dtype:
            return False
        sizes = [(a, b) for a, b in zip(first, last, strict=True) if isinstance(a, int) and isinstance(b, int)]
        return isinstance(first[-1], int) and first[-1] == last[-1] and all(a == b for a, b in sizes)

    def _caches(self, block: ResidualBlock) -> str:
        """Fill in the caches; return why they cannot go."""
        node = block.attention
        if not is_attention(node):
            return "" if len(node.outputs) == 1 else f"its attention is the operator {node.op} already"
        if not any(node.inputs[1].inputs and node.inputs[1].inputs[0] is other for other in block.nodes):
            return _CROSS
        caches = caches_of(self.model, node)
        if isinstance(caches, str):
            return caches
        block.caches = caches
        return ""

    def _leaks(self, block: ResidualBlock, inner: set[int], last: int) -> str:
        """Return what else than its result and its caches leaves a block."""
        caches = {id(tensor) for cache in block.caches for tensor in cache.tensors}
        if id(block.after) in self.outputs:
            return f"'{block.after.name}' is an output of the model"
        inside = {id(self.nodes[p]) for p in (*inner, last)}
        for position in inner:
            for tensor in self.nodes[position].outputs:
                if id(tensor) in self.outputs and id(tensor) not in caches:
                    return f"'{tensor.name}' is an output of the model"
                other = next((n for n in tensor.outputs if id(n) not in inside and n.op not in _WATCHERS), None)
                if other is not None:
                    return f"{other.op} '{other.name or other.outputs[0].name}' outside of it reads '{tensor.name}'"
        return ""
