"""Walking through the nested parts of a model."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from onnxslim_llm.ir.ownership import attribute_constants, owned_constants, subgraphs

__all__ = ["all_constants", "operator_name", "with_subgraphs"]


def operator_name(node: gs.Node) -> str:
    """Return "domain::Op", or plain "Op" for ai.onnx."""
    return str(node.op) if node.domain in (None, "", "ai.onnx") else f"{node.domain}::{node.op}"


def with_subgraphs(graph: gs.Graph) -> Iterator[gs.Graph]:
    """Yield a graph and all graphs nested in it, outer ones first."""
    yield graph
    for node in graph.nodes:
        for subgraph in subgraphs(node):
            yield from with_subgraphs(subgraph)


def all_constants(graph: gs.Graph, outer: frozenset[int] = frozenset()) -> Iterator[gs.Constant]:
    """Yield the constants that a graph and its subgraphs store, and those in attributes; each once, as written."""
    owned = owned_constants(graph, outer)
    yield from owned
    inner = outer | {id(constant) for constant in owned}
    for node in graph.nodes:
        yield from attribute_constants(node)
        for subgraph in subgraphs(node):
            yield from all_constants(subgraph, inner)
