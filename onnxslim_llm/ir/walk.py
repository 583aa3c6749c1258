"""Walking through the nested parts of a model."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from onnxslim_llm.ir.ownership import attribute_constants, owned_constants, subgraphs

__all__ = ["all_constants", "all_initializers", "operator_name", "with_subgraphs"]


def operator_name(node: gs.Node) -> str:
    """Return "domain::Op", or plain "Op" for ai.onnx."""
    return str(node.op) if node.domain in (None, "", "ai.onnx") else f"{node.domain}::{node.op}"


def with_subgraphs(graph: gs.Graph) -> Iterator[gs.Graph]:
    """Yield a graph and all graphs nested in it, outer ones first."""
    yield graph
    for node in graph.nodes:
        for subgraph in subgraphs(node):
            yield from with_subgraphs(subgraph)


def all_initializers(graph: gs.Graph, outer: frozenset[int] = frozenset()) -> Iterator[gs.Constant]:
    """Yield the initializers that a graph and its subgraphs store, each once, as written."""
    owned = owned_constants(graph, outer)
    yield from owned
    inner = outer | {id(constant) for constant in owned}
    for node in graph.nodes:
        for subgraph in subgraphs(node):
            yield from all_initializers(subgraph, inner)


def all_constants(graph: gs.Graph) -> Iterator[gs.Constant]:
    """Yield the initializers of a graph and its subgraphs, then the constants in attributes of their nodes."""
    yield from all_initializers(graph)
    for item in with_subgraphs(graph):
        for node in item.nodes:
            yield from attribute_constants(node)
