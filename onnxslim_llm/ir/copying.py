"""Structural copies: new nodes and tensors, the same weights, attributes and skeletons."""

from __future__ import annotations

from typing import Any

import onnx_graphsurgeon as gs

from onnxslim_llm.ir.proto.imports import copy_imports
from onnxslim_llm.ir.proto.skeleton import FunctionSkeleton, GraphSkeleton, skeleton_of

__all__ = ["copy_graph", "copy_nodes"]


def copy_graph(graph: gs.Graph) -> gs.Graph:
    """Return a copy of a top graph with its subgraphs and functions."""
    tensors: dict[int, gs.Tensor] = {}
    twin = _copy(graph, tensors)
    functions = [_copy(function, {}) for function in graph.functions]
    shared: list[gs.Function] = functions
    for item in (twin, *functions):
        _share_functions(item, shared)
    return twin


def copy_nodes(graph: gs.Graph, tensors: dict[int, gs.Tensor]) -> list[gs.Node]:
    """Return copies of the nodes of a graph or function, for another graph.

    Args:
        graph: What is copied; it stays as it is.
        tensors: What stands for a tensor of `graph` (by its `id`) in the copy. All others are copied, and added here.
    """
    return [_node(node, tensors) for node in graph.nodes]


def _copy(graph: gs.Graph, tensors: dict[int, gs.Tensor]) -> Any:
    skeleton = skeleton_of(graph, GraphSkeleton) or skeleton_of(graph, FunctionSkeleton)
    if isinstance(skeleton, GraphSkeleton):
        for constant in skeleton.initializers:
            _tensor(constant, tensors)
    nodes = [_node(node, tensors) for node in graph.nodes]
    values = {
        "nodes": nodes,
        "inputs": [_tensor(tensor, tensors) for tensor in graph.inputs],
        "outputs": [_tensor(tensor, tensors) for tensor in graph.outputs],
        "name": graph.name,
        "doc_string": graph.doc_string,
        "opset": graph.opset,
        "import_domains": None if graph.import_domains is None else copy_imports(graph.import_domains),
        "ir_version": graph.ir_version,
    }
    if isinstance(graph, gs.Function):
        twin = gs.Function(domain=graph.domain, attrs=dict(graph.attrs), **values)
    else:
        twin = gs.Graph(producer_name=graph.producer_name, producer_version=graph.producer_version, **values)
    twin.name_idx = graph.name_idx
    if isinstance(skeleton, FunctionSkeleton):
        pairs = [(entry, None if item is None else _tensor(item, tensors)) for entry, item in skeleton.value_info]
        twin.skeleton = FunctionSkeleton(skeleton.proto, skeleton.attributes, pairs)
    elif isinstance(skeleton, GraphSkeleton):
        twin.skeleton = _graph_skeleton(skeleton, tensors)
    return twin


def _graph_skeleton(skeleton: GraphSkeleton, tensors: dict[int, gs.Tensor]) -> GraphSkeleton:
    return GraphSkeleton(
        proto=skeleton.proto,
        initializers=[_tensor(item, tensors) for item in skeleton.initializers],
        orphans={id(tensors[identity]) for identity in skeleton.orphans if identity in tensors},
        inputs=[(entry, _tensor(item, tensors)) for entry, item in skeleton.inputs],
        outputs=[(entry, _tensor(item, tensors)) for entry, item in skeleton.outputs],
        value_info=[(entry, None if item is None else _tensor(item, tensors)) for entry, item in skeleton.value_info],
        annotations=[
            (annotation, {name: _tensor(item, tensors) for name, item in named.items()})
            for annotation, named in skeleton.annotations
        ],
    )


def _node(node: gs.Node, tensors: dict[int, gs.Tensor]) -> gs.Node:
    attributes = {}
    for name, value in node.attrs.items():
        if isinstance(value, gs.Graph):
            value = _copy(value, tensors)
        elif isinstance(value, list):
            value = list(value)
        elif isinstance(value, gs.Constant):
            value = _tensor(value, {})
        attributes[name] = value
    twin = gs.Node(
        node.op,
        node.name,
        attributes,
        [_tensor(tensor, tensors) for tensor in node.inputs],
        [_tensor(tensor, tensors) for tensor in node.outputs],
        node.domain,
    )
    _copy_skeleton(node, twin)
    return twin


def _tensor(tensor: gs.Tensor, tensors: dict[int, gs.Tensor]) -> gs.Tensor:
    twin = tensors.get(id(tensor))
    if twin is None:
        if isinstance(tensor, gs.Constant):
            twin = gs.Constant(tensor.name, tensor._values, tensor.data_location)
            twin._export_dtype = tensor._export_dtype
        else:
            shape = None if tensor.shape is None else list(tensor.shape)
            twin = gs.Variable(tensor.name, tensor.dtype, shape, tensor.type)
        _copy_skeleton(tensor, twin)
        tensors[id(tensor)] = twin
    return twin


def _copy_skeleton(old: Any, new: Any) -> None:
    for name in ("skeleton", "inferred", "overridable"):
        if name in old.__dict__:
            setattr(new, name, old.__dict__[name])


def _share_functions(graph: gs.Graph, functions: list[gs.Function]) -> None:
    graph._functions = functions
    for node in graph.nodes:
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                value.import_domains = graph.import_domains
                _share_functions(value, functions)
