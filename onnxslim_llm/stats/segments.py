"""Cutting a model into consecutive parts, so that the statistics of one part at a time fit into memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx

from onnxslim_llm.stats.taps import Tap

__all__ = ["Segment", "extract", "plan_segments"]

#: Bytes of the sums of a tap for each element of H: the float64 sum and the float32 product of a piece.
_GRAM_BYTES = 12


@dataclass(frozen=True)
class Segment:
    """The nodes [start, stop) of a graph.

    Attributes:
        taps: Those that are produced here, or carried in and not tapped yet.
        carried_in: Tensors that earlier segments hand on to this one or to later ones.
        carried_out: Likewise after it.
    """

    start: int
    stop: int
    taps: tuple[Tap, ...]
    carried_in: tuple[str, ...]
    carried_out: tuple[str, ...]


def plan_segments(
    graph: onnx.GraphProto, taps: Sequence[Tap], limit: int, *, before_readers: bool = False
) -> list[Segment]:
    """Cut `graph` so that the H matrices of one segment take at most `limit` bytes (a single one may take more).

    Between two groups of taps the cut goes where the fewest tensors cross it: in a transformer on the residual stream.

    Args:
        graph: Nodes in topological order.
        taps: What `find_taps` returned.
        limit: Bytes.
        before_readers: Cut before anything reads the taps of a segment, rather than where the fewest tensors cross.
    """
    made = {name: i for i, node in enumerate(graph.node) for name in node.output}
    ordered = sorted(taps, key=lambda tap: made.get(tap.tensor, -1))
    groups: list[list[Tap]] = []
    used = 0
    for tap in ordered:
        size = _GRAM_BYTES * tap.size**2
        if not groups or (used + size > limit and used):
            groups.append([])
            used = 0
        groups[-1].append(tap)
        used += size
    crossing = list(_crossing(graph))
    cuts = [0]
    for group, after in itertools.pairwise(groups):
        low = made.get(group[-1].tensor, -1) + 1
        high = max(low, made.get(after[0].tensor, -1))
        if before_readers:
            high = max(low, min(high, *(tap.position for tap in group)))
        cuts.append(min(range(low, high + 1), key=lambda p: (len(crossing[p]), -p)))
    last = max((made.get(tap.tensor, -1) for tap in ordered), default=-1) + 1
    bounds = [*cuts, max(last, cuts[-1])]
    ends = [crossing[p] if p < last else () for p in bounds]
    return [
        Segment(
            bounds[i], bounds[i + 1], tuple(group), ends[i] if i else (), ends[i + 1] if i + 1 < len(groups) else ()
        )
        for i, group in enumerate(groups)
    ]


def _crossing(graph: onnx.GraphProto) -> Iterator[tuple[str, ...]]:
    """Yield for every position the tensors made before it and read at or after it; constants do not count."""
    last_read: dict[str, int] = {}
    for i, node in enumerate(graph.node):
        for name in _reads(node):
            last_read[name] = i
    alive: dict[str, None] = {}
    for i, node in enumerate(graph.node):
        for name in [name for name in alive if last_read.get(name, -1) < i]:
            del alive[name]
        yield tuple(alive)
        if node.op_type != "Constant":
            alive.update((name, None) for name in node.output if last_read.get(name, -1) > i)
    yield ()


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs] if attribute.type in _GRAPHS else []:
            for inner in graph.node:
                yield from _reads(inner)
            yield from (output.name for output in graph.output)


_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def extract(model: onnx.ModelProto, segment: Segment, carried: dict[str, int]) -> onnx.ModelProto:
    """Return the model of one segment: graph inputs and carried tensors in, taps and tensors to carry on out.

    Args:
        model: The whole model; external data stay where they are.
        segment: One of `plan_segments`.
        carried: Element type (TensorProto.DataType) of every tensor of `segment.carried_in`.
    """
    wanted = [*dict.fromkeys([*(tap.tensor for tap in segment.taps), *segment.carried_out])]
    needed, nodes = set(wanted), []
    for i in range(segment.stop - 1, -1, -1):
        node = model.graph.node[i]
        inside = i >= segment.start or node.op_type == "Constant"
        if inside and not needed.isdisjoint(node.output):
            nodes.append(node)
            needed.update(_reads(node))
    part = onnx.ModelProto()
    part.CopyFrom(_without_graph(model))
    graph = part.graph
    graph.name = model.graph.name or "segment"
    graph.node.extend(reversed(nodes))
    graph.initializer.extend(t for t in model.graph.initializer if t.name in needed)
    graph.sparse_initializer.extend(t for t in model.graph.sparse_initializer if t.values.name in needed)
    graph.input.extend(i for i in model.graph.input if i.name in needed)
    graph.input.extend(
        onnx.helper.make_tensor_value_info(name, carried[name], None) for name in segment.carried_in if name in needed
    )
    made = {name for node in nodes for name in node.output}
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name in made)
    return part


def _without_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    head = onnx.ModelProto()
    head.ir_version = model.ir_version
    head.opset_import.extend(model.opset_import)
    head.functions.extend(model.functions)
    return head
