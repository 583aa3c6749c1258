"""ModelProto to graphsurgeon objects, losing nothing: see `skeleton` for where the rest goes."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_graphsurgeon as gs

from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.ownership import used_ids
from onnxslim_llm.ir.proto.attributes import read_attribute
from onnxslim_llm.ir.proto.imports import copy_imports
from onnxslim_llm.ir.proto.skeleton import FunctionSkeleton, GraphSkeleton, NodeSkeleton, copy_without, skeleton_of
from onnxslim_llm.ir.proto.tensors import TensorReader
from onnxslim_llm.ir.proto.values import variable
from onnxslim_llm.ir.walk import with_subgraphs

__all__ = ["TensorReader", "adopt", "describe", "mark_overridable", "read_function", "read_graph"]

_GRAPH_LISTS = frozenset(
    ["node", "initializer", "sparse_initializer", "input", "output", "value_info", "quantization_annotation"]
)
_FUNCTION_LISTS = frozenset(
    ["node", "input", "output", "value_info", "attribute", "attribute_proto", "opset_import", "doc_string"]
)
_NODE_LISTS = frozenset(["input", "output", "attribute"])
_AGAIN = "the model is invalid: export it again"


class _Scope:
    """Names visible in a graph: its own, and those of the graphs around it."""

    def __init__(self, outer: _Scope | None) -> None:
        self.local: dict[str, gs.Tensor] = {}
        self.ready: set[str] = set()
        self.outer = outer

    def find(self, name: str) -> gs.Tensor | None:
        if name in self.ready:
            return self.local[name]
        found = self.outer.find(name) if self.outer is not None else None
        # A name that is made further down in the same graph: the nodes are not sorted.
        return self.local.get(name) if found is None else found


def read_graph(proto: onnx.GraphProto, tensors: TensorReader, outer: _Scope | None = None) -> gs.Graph:
    """Read a graph with its subgraphs.

    Raises:
        ModelError: A tensor has several producers or none, or its data is broken.
    """
    skeleton = GraphSkeleton(copy_without(proto, _GRAPH_LISTS))
    scope = _Scope(outer)
    entries = _entries(proto)
    for constant in [
        *(tensors.constant(item) for item in proto.initializer),
        *(tensors.sparse(item) for item in proto.sparse_initializer),
    ]:
        _define(scope, constant, "initializer")
        skeleton.initializers.append(constant)
    constants = set(scope.local)
    inputs = []
    for entry in proto.input:
        if entry.name not in constants:
            tensor = variable(entry.name, entries.get(entry.name, {}))
            _define(scope, tensor, "graph input")
            inputs.append(tensor)
        skeleton.inputs.append((entry, scope.local[entry.name]))
    scope.ready = set(scope.local)
    nodes = _read_nodes(proto.node, entries, tensors, scope)
    outputs = []
    for entry in proto.output:
        found = scope.find(entry.name)
        if found is None:
            raise _unproduced(entry.name, "a graph output")
        skeleton.outputs.append((entry, found))
        outputs.append(found)
    skeleton.value_info = [(entry, scope.local.get(entry.name)) for entry in proto.value_info]
    for annotation in proto.quantization_annotation:
        names = [annotation.tensor_name, *(item.value for item in annotation.quant_parameter_tensor_names)]
        skeleton.annotations.append((annotation, {name: scope.local[name] for name in names if name in scope.local}))
    graph = gs.Graph(nodes=nodes, inputs=inputs, outputs=outputs, name=proto.name, doc_string=proto.doc_string)
    graph.skeleton = skeleton
    if skeleton.initializers:
        used = used_ids(graph)
        skeleton.orphans = {id(item) for item in skeleton.initializers if id(item) not in used}
    return graph


def read_function(proto: onnx.FunctionProto, tensors: TensorReader) -> gs.Function:
    """Read a model-local function.

    Raises:
        ModelError: A tensor has several producers or none, or its data is broken.
    """
    scope = _Scope(None)
    entries: dict[str, dict[str, onnx.ValueInfoProto]] = {}
    for entry in proto.value_info:
        entries.setdefault(entry.name, {}).setdefault("info", entry)
    where = f"function '{proto.domain}::{proto.name}'"
    inputs = []
    for name in proto.input:
        tensor = variable(name, entries.get(name, {}))
        _define(scope, tensor, f"input of {where}")
        inputs.append(tensor)
    scope.ready = set(scope.local)
    nodes = _read_nodes(proto.node, entries, tensors, scope)
    outputs = []
    for name in proto.output:
        found = scope.local.get(name)
        if found is None:
            raise _unproduced(name, f"an output of {where}")
        outputs.append(found)
    attributes: dict[str, object] = dict.fromkeys(proto.attribute)
    skeletons = {}
    for attribute in proto.attribute_proto:
        attributes[attribute.name], skeletons[attribute.name] = read_attribute(
            attribute, tensors.constant, lambda graph: read_graph(graph, tensors)
        )
    function = gs.Function(
        proto.name,
        proto.domain,
        nodes=nodes,
        inputs=inputs,
        outputs=outputs,
        doc_string=proto.doc_string,
        import_domains=copy_imports(proto.opset_import),
        attrs=attributes,
    )
    value_info = [(entry, scope.local.get(entry.name)) for entry in proto.value_info]
    function.skeleton = FunctionSkeleton(copy_without(proto, _FUNCTION_LISTS), skeletons, value_info)
    return function


def adopt(graph: gs.Graph, functions: list[gs.Function], imports: list[onnx.OperatorSetIdProto], opset: int) -> None:
    """Give a graph or function and its subgraphs the model's one list of functions, and their opset imports.

    Args:
        graph: The graph.
        functions: The list itself is shared, as graphsurgeon wants it.
        imports: Shared too.
        opset: Version of ai.onnx; 0 leaves graphsurgeon's default.
    """
    for item in with_subgraphs(graph):
        item._functions = functions
        item.import_domains = imports
        item.opset = opset or item.opset


def mark_overridable(graph: gs.Graph) -> None:
    """Mark the initializers of a top graph that are listed as inputs: a caller may give them other values."""
    for _, tensor in skeleton_of(graph, GraphSkeleton).inputs:
        if isinstance(tensor, gs.Constant):
            tensor.overridable = True


def describe(node: gs.Node | onnx.NodeProto) -> str:
    """Return how messages name a node: by name and operator, unnamed ones by their first output."""
    if isinstance(node, onnx.NodeProto):
        operator, outputs = node.op_type, list(node.output)
    else:
        operator, outputs = node.op, [tensor.name for tensor in node.outputs]
    if node.name:
        return f"node '{node.name}' ({operator})"
    return f"node ({operator}) that makes '{next((name for name in outputs if name), '')}'"


def _read_nodes(
    protos: Sequence[onnx.NodeProto],
    entries: dict[str, dict[str, onnx.ValueInfoProto]],
    tensors: TensorReader,
    scope: _Scope,
) -> list[gs.Node]:
    for proto in protos:
        for name in proto.output:
            if name:
                _define(scope, variable(name, entries.get(name, {})), describe(proto), proto)
    return [_read_node(proto, tensors, scope) for proto in protos]


def _read_node(proto: onnx.NodeProto, tensors: TensorReader, scope: _Scope) -> gs.Node:
    inputs = []
    for name in proto.input:
        tensor = scope.find(name) if name else gs.Variable.empty()
        if tensor is None:
            raise _unproduced(name, f"an input of {describe(proto)}")
        inputs.append(tensor)
    attributes, skeletons = {}, {}
    for attribute in proto.attribute:
        if attribute.name in attributes:
            raise ModelError(f"attribute '{attribute.name}' is given twice", where=describe(proto), todo=_AGAIN)
        attributes[attribute.name], skeletons[attribute.name] = read_attribute(
            attribute, tensors.constant, lambda graph: read_graph(graph, tensors, scope)
        )
    outputs = [scope.local[name] if name else gs.Variable.empty() for name in proto.output]
    node = gs.Node(
        proto.op_type,
        proto.name,
        attributes,
        inputs,
        outputs,
        proto.domain if proto.HasField("domain") else None,
    )
    node.skeleton = NodeSkeleton(copy_without(proto, _NODE_LISTS), skeletons)
    scope.ready.update(name for name in proto.output if name)
    return node


def _entries(proto: onnx.GraphProto) -> dict[str, dict[str, onnx.ValueInfoProto]]:
    entries: dict[str, dict[str, onnx.ValueInfoProto]] = {}
    for role, values in (("input", proto.input), ("output", proto.output), ("info", proto.value_info)):
        for entry in values:
            entries.setdefault(entry.name, {}).setdefault(role, entry)
    return entries


def _define(scope: _Scope, tensor: gs.Tensor, by: str, node: onnx.NodeProto | None = None) -> None:
    if tensor.name in scope.local:
        raise ModelError(
            f"tensor '{tensor.name}' is produced more than once",
            where=by if node is not None else f"{by} '{tensor.name}'",
            todo=_AGAIN,
        )
    scope.local[tensor.name] = tensor


def _unproduced(name: str, what: str) -> ModelError:
    return ModelError(
        f"tensor '{name}' is never produced",
        where=f"it is {what}",
        todo="the model is invalid: export it again, or add the missing input or initializer",
    )
