"""Graphs as graphs: order, capture by subgraphs, and views for networkx.

gs nodes and tensors compare by name and cannot be hashed: everything goes by identity or by position in `graph.nodes`.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator

import networkx as nx
import onnx_graphsurgeon as gs

from onnxslim_llm.errors import ModelError

__all__ = ["captured", "digraph", "is_convex", "predecessors", "read_tensors", "sort_nodes"]

#: Nodes named in the message about a cycle.
CYCLE_NODES_SHOWN = 8


def captured(node: gs.Node) -> Iterator[gs.Tensor]:
    """Yield the tensors that the subgraphs of `node`, at any depth, read; those of the subgraphs themselves too."""
    for graph in node.subgraphs(recursive=True):
        for inner in graph.nodes:
            yield from inner.inputs
        yield from graph.outputs


def read_tensors(node: gs.Node) -> Iterator[gs.Tensor]:
    """Yield what `node` needs to run: its inputs, and whatever its subgraphs read."""
    yield from node.inputs
    yield from captured(node)


def predecessors(graph: gs.Graph) -> list[set[int]]:
    """Return for each node the positions of the nodes of the same graph that it needs, through subgraphs too."""
    producer = {id(t): i for i, node in enumerate(graph.nodes) for t in node.outputs if not t.is_empty()}
    return [{producer[id(t)] for t in read_tensors(node) if id(t) in producer} for node in graph.nodes]


def sort_nodes(graph: gs.Graph) -> bool:
    """Put the nodes of `graph` in topological order, in place; subgraphs are not entered.

    Stable: a node moves only as far as its inputs make it (Kahn's algorithm that always takes the ready node which
    came first before).

    Returns:
        Whether the order changed.

    Raises:
        ModelError: The graph has a cycle; some of its nodes are named.
    """
    needs = predecessors(graph)
    if all(all(p < i for p in before) for i, before in enumerate(needs)):
        return False
    users: list[list[int]] = [[] for _ in needs]
    waiting = [len(before) for before in needs]
    for i, before in enumerate(needs):
        for p in before:
            users[p].append(i)
    ready = [i for i, count in enumerate(waiting) if count == 0]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        i = heapq.heappop(ready)
        order.append(i)
        for user in users[i]:
            waiting[user] -= 1
            if waiting[user] == 0:
                heapq.heappush(ready, user)
    if len(order) < len(needs):
        raise _cycle_error(graph, needs)
    graph.nodes[:] = [graph.nodes[i] for i in order]
    return True


def _cycle_error(graph: gs.Graph, needs: list[set[int]]) -> ModelError:
    edges = ((p, i) for i, before in enumerate(needs) for p in before)
    cycle = [edge[0] for edge in nx.find_cycle(nx.DiGraph(edges))]
    names = [graph.nodes[i].name or f"{graph.nodes[i].op} #{i}" for i in cycle[:CYCLE_NODES_SHOWN]]
    more = f" ... ({len(cycle)} nodes)" if len(cycle) > CYCLE_NODES_SHOWN else ""
    return ModelError(
        "the graph has a cycle",
        where=" -> ".join(names) + more,
        todo="check the exporter: an ONNX graph must be acyclic",
    )


def digraph(graph: gs.Graph) -> nx.DiGraph:
    """Return the data flow between the nodes of `graph`: vertices are positions in `graph.nodes`, attribute `node`."""
    flow = nx.DiGraph()
    flow.add_nodes_from((i, {"node": node}) for i, node in enumerate(graph.nodes))
    flow.add_edges_from((p, i) for i, before in enumerate(predecessors(graph)) for p in before)
    return flow


def is_convex(flow: nx.DiGraph, region: Collection[int]) -> bool:
    """Return whether no path leaves `region` and comes back: only then can one node take its place.

    Args:
        flow: What `digraph` returned.
        region: Positions of nodes.
    """
    inside = set(region)
    left = {v for u in inside for v in flow.successors(u) if v not in inside}
    reached = set(left)
    while left:
        after = {v for u in left for v in flow.successors(u)}
        if after & inside:
            return False
        left = after - reached
        reached |= after
    return True
