from __future__ import annotations

import onnx_graphsurgeon as gs
import pytest

from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.topology import captured, digraph, is_convex, sort_nodes


def chain(*edges: tuple[str, str, str]) -> gs.Graph:
    """A graph of (node name, space separated inputs, space separated outputs)."""
    tensors: dict[str, gs.Variable] = {}

    def tensor(name: str) -> gs.Variable:
        return tensors.setdefault(name, gs.Variable(name))

    nodes = [
        gs.Node("Op", name, inputs=[tensor(t) for t in reads.split()], outputs=[tensor(t) for t in writes.split()])
        for name, reads, writes in edges
    ]
    return gs.Graph(nodes, [tensors["x"]] if "x" in tensors else [], [])


def names(graph: gs.Graph) -> list[str]:
    return [node.name for node in graph.nodes]


def test_sorted_graph_keeps_its_order() -> None:
    graph = chain(("a", "x", "p"), ("b", "x", "q"), ("c", "p q", "r"))
    assert sort_nodes(graph) is False
    assert names(graph) == ["a", "b", "c"]


def test_only_the_displaced_node_moves() -> None:
    graph = chain(("late", "s", "t"), ("a", "x", "p"), ("b", "p", "q"), ("c", "x", "s"))
    assert sort_nodes(graph) is True
    assert names(graph) == ["a", "b", "c", "late"]


def test_unnamed_equal_nodes_stay_apart() -> None:
    graph = chain(("", "p", "q"), ("", "x", "p"))
    sort_nodes(graph)
    assert [node.outputs[0].name for node in graph.nodes] == ["p", "q"]


def test_a_node_waits_for_what_its_subgraph_reads() -> None:
    graph = chain(("make", "x", "p"))
    outer = graph.nodes[0].outputs[0]
    result = gs.Variable("inner")
    body = gs.Graph([gs.Node("Op", "inside", inputs=[outer], outputs=[result])], [], [result])
    holder = gs.Node("If", "holder", {"then_branch": body}, [gs.Variable("x")], [gs.Variable("y")])
    graph.nodes.insert(0, holder)
    assert [t.name for t in captured(holder)] == ["p", "inner"]
    assert sort_nodes(graph) is True
    assert names(graph) == ["make", "holder"]


def test_a_cycle_is_an_error_that_names_its_nodes() -> None:
    graph = chain(("free", "x", "z"), ("a", "q", "p"), ("b", "p", "q"))
    with pytest.raises(ModelError, match="cycle") as caught:
        sort_nodes(graph)
    assert set(caught.value.where.split(" -> ")) == {"a", "b"}


def test_convexity() -> None:
    flow = digraph(chain(("a", "x", "p"), ("b", "p", "q"), ("c", "q p", "r"), ("d", "r", "s")))
    assert is_convex(flow, {0, 1, 2})
    assert is_convex(flow, {2, 3})
    assert not is_convex(flow, {0, 2})
    assert flow.nodes[1]["node"].name == "b"
