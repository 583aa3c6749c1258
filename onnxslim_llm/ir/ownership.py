"""Which graph stores which constant.

graphsurgeon has no list of initializers: constants are found at their users. A constant that was read belongs to the
graph that declared it; a new one belongs to the outermost graph that uses it directly.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from onnxslim_llm.errors import CompilerBug
from onnxslim_llm.ir.proto.skeleton import GraphSkeleton, skeleton_of
from onnxslim_llm.ir.weights import weight_of

__all__ = [
    "attribute_constants",
    "drop_orphans",
    "is_overridable",
    "orphans",
    "owned_constants",
    "subgraphs",
    "used_ids",
]


def is_overridable(tensor: gs.Tensor) -> bool:
    """Return whether an initializer is only the default of a graph input: the caller may give another value.

    (ONNX since IR version 4: an initializer that is listed among the inputs. Before, all of them had to be listed.)
    """
    return bool(tensor.__dict__.get("overridable", False))


def subgraphs(node: gs.Node) -> Iterator[gs.Graph]:
    """Yield the graphs in a node's attributes, not recursively."""
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            yield value


def attribute_constants(node: gs.Node) -> Iterator[gs.Constant]:
    """Yield the constants in a node's attributes (`value` of a Constant node)."""
    for value in node.attrs.values():
        if isinstance(value, gs.Constant):
            yield value


def used_ids(graph: gs.Graph) -> set[int]:
    """Return the `id`s of all tensors that occur in a graph or in its subgraphs."""
    used = {id(tensor) for tensor in graph.inputs} | {id(tensor) for tensor in graph.outputs}
    for node in graph.nodes:
        used.update(map(id, node.inputs))
        used.update(map(id, node.outputs))
        for subgraph in subgraphs(node):
            used |= used_ids(subgraph)
    return used


def owned_constants(graph: gs.Graph, outer: frozenset[int] = frozenset()) -> list[gs.Constant]:
    """Return the constants that `graph` stores: those read, in their order, then new ones in the order of their use.

    Args:
        graph: A graph or function.
        outer: `id`s of constants that the graphs around it store.

    Raises:
        CompilerBug: Two different constants have one name.
    """
    skeleton: GraphSkeleton | None = skeleton_of(graph, GraphSkeleton)
    found: dict[int, gs.Constant] = {}
    if skeleton is not None:
        used = used_ids(graph)
        for constant in skeleton.initializers:
            kept = id(constant) in used or id(constant) in skeleton.orphans or is_overridable(constant)
            if isinstance(constant, gs.Constant) and kept:
                found[id(constant)] = constant
    for node in graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant):
                found.setdefault(id(tensor), tensor)
    for tensor in graph.outputs:
        if isinstance(tensor, gs.Constant):
            found.setdefault(id(tensor), tensor)
    by_name: dict[str, gs.Constant] = {}
    for identity, constant in found.items():
        if identity in outer:
            continue
        other = by_name.setdefault(constant.name, constant)
        if other is not constant and weight_of(other).key != weight_of(constant).key:
            raise CompilerBug(
                f"two different constants are called '{constant.name}'",
                where=f"graph '{graph.name}'",
                todo="make names with Model.fresh_name",
            )
    return list(by_name.values())


def orphans(graph: gs.Graph) -> list[gs.Constant]:
    """Return the initializers that nothing used when the model was read, and that are still kept."""
    skeleton: GraphSkeleton | None = skeleton_of(graph, GraphSkeleton)
    if skeleton is None:
        return []
    used = used_ids(graph)
    unused = [item for item in skeleton.initializers if id(item) in skeleton.orphans and id(item) not in used]
    return [item for item in unused if not is_overridable(item)]


def drop_orphans(graph: gs.Graph) -> list[str]:
    """Forget the initializers that nothing used from the start (others vanish with their last user); return names."""
    names = [constant.name for constant in orphans(graph)]
    if names:
        skeleton = skeleton_of(graph, GraphSkeleton)
        skeleton.orphans.clear()
    return names
