"""Is the graph one that can run: every tensor has one producer, and no node depends on itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import networkx as nx
import onnx_graphsurgeon as gs
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from onnx import TensorProto

from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.ownership import owned_constants, subgraphs
from onnxslim_llm.ir.proto.reader import describe
from onnxslim_llm.ir.walk import with_subgraphs

__all__ = ["check_graphs", "check_text"]

_AGAIN = "the model is invalid: export it again"


def check_text(message: Message, where: str) -> None:
    """Check that names and other texts are UTF-8; Python could not write them back.

    Raises:
        ModelError: It names the field.
    """
    if isinstance(message, TensorProto):
        # Listing its fields would copy the data.
        texts: list[tuple[str, Any]] = [("name", message.name), ("doc_string", message.doc_string)]
        wrong = next((name for name, value in texts if isinstance(value, bytes)), None)
    else:
        wrong = None
        for field, value in message.ListFields():
            if field.type == FieldDescriptor.TYPE_MESSAGE:
                for item in [value] if isinstance(value, Message) else value:
                    check_text(item, where)
            elif field.type == FieldDescriptor.TYPE_STRING:
                items: Any = [value] if isinstance(value, str | bytes) else value
                wrong = field.name if any(isinstance(item, bytes) for item in items) else wrong
    if wrong:
        raise ModelError(
            f"a text is not UTF-8: field '{wrong}' of {type(message).__name__}", where=where, todo="export it again"
        )


def check_graphs(graph: gs.Graph, functions: Sequence[gs.Function]) -> list[str]:
    """Check a model's graph and functions; return notes on what is unusual but allowed.

    Raises:
        ModelError: It names the tensor or node.
    """
    notes: list[str] = []
    for scope in (graph, *functions):
        _check_graph(scope, frozenset(), notes)
    _check_calls(functions)
    return notes


def _check_calls(functions: Sequence[gs.Function]) -> None:
    """Check that no model-local function calls itself, directly or through others: ONNX has no recursion."""
    names = {(function.domain, function.name) for function in functions}
    calls = nx.DiGraph()
    for function in functions:
        for graph in with_subgraphs(function):
            targets = {(node.domain, node.op) for node in graph.nodes} & names
            calls.add_edges_from(((function.domain, function.name), target) for target in targets)
    try:
        cycle = nx.find_cycle(calls)
    except nx.NetworkXNoCycle:
        return
    shown = " -> ".join(f"{domain}::{name}" for domain, name in [cycle[0][0], *(target for _, target in cycle)])
    raise ModelError("a model-local function calls itself", where=f"functions {shown}", todo=_AGAIN)


def _check_graph(graph: gs.Graph, outer: frozenset[str], notes: list[str]) -> None:
    producers: dict[str, gs.Node | None] = {}
    for tensor in (*graph.inputs, *owned_constants(graph)):
        producers.setdefault(tensor.name, None)
    for node in graph.nodes:
        for tensor in node.outputs:
            if not tensor.name:
                continue
            if tensor.name in producers:
                raise ModelError(
                    f"tensor '{tensor.name}' is produced more than once", where=describe(node), todo=_AGAIN
                )
            producers[tensor.name] = node
    visible = outer | producers.keys()
    made = outer | {name for name, node in producers.items() if node is None}
    done = set(made)
    sorted_so_far = True
    needs: list[dict[str, None]] = []
    for node in graph.nodes:
        wanted = dict.fromkeys(tensor.name for tensor in node.inputs if tensor.name)
        for name in wanted:
            if name not in visible:
                raise ModelError(
                    f"tensor '{name}' is never produced", where=f"it is an input of {describe(node)}", todo=_AGAIN
                )
        for subgraph in subgraphs(node):
            _check_graph(subgraph, frozenset(visible), notes)
            wanted.update(dict.fromkeys(_captured(subgraph)))
        sorted_so_far = sorted_so_far and all(name in done for name in wanted if name in visible)
        done.update(tensor.name for tensor in node.outputs)
        needs.append(wanted)
    for tensor in graph.outputs:
        if tensor.name not in visible:
            raise ModelError(f"tensor '{tensor.name}' is never produced", where="it is a graph output", todo=_AGAIN)
    if not sorted_so_far:
        _check_cycles(graph, producers, needs)
        notes.append(f"the nodes of graph '{graph.name}' are not in topological order")


def _check_cycles(graph: gs.Graph, producers: dict[str, gs.Node | None], needs: list[dict[str, None]]) -> None:
    edges = nx.DiGraph()
    for node, wanted in zip(graph.nodes, needs, strict=True):
        for name in wanted:
            producer = producers.get(name)
            if producer is not None:
                edges.add_edge(id(producer), id(node), tensor=name)
    try:
        cycle = nx.find_cycle(edges)
    except nx.NetworkXNoCycle:
        return
    tensors = {source: edges.edges[source, target]["tensor"] for source, target in cycle}
    first = next(node for node in graph.nodes if id(node) in tensors)
    raise ModelError(
        f"the graph has a cycle of {len(cycle)} nodes through tensor '{tensors[id(first)]}'",
        where=describe(first),
        todo=_AGAIN,
    )


def _captured(graph: gs.Graph) -> set[str]:
    """Names that a subgraph and its subgraphs take from around it."""
    local = {tensor.name for tensor in (*graph.inputs, *owned_constants(graph))}
    wanted: set[str] = {tensor.name for tensor in graph.outputs}
    for node in graph.nodes:
        local.update(tensor.name for tensor in node.outputs)
        wanted.update(tensor.name for tensor in node.inputs if tensor.name)
        for subgraph in subgraphs(node):
            wanted |= _captured(subgraph)
    return wanted - local
