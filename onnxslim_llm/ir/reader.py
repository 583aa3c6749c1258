"""ModelProto to graphsurgeon objects, losing nothing: see `skeleton` for where the rest goes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.attributes import read_attribute
from onnxslim_llm.ir.external import ExternalFiles
from onnxslim_llm.ir.mapping import MappedFile
from onnxslim_llm.ir.skeleton import FunctionSkeleton, GraphSkeleton, NodeSkeleton, copy_without
from onnxslim_llm.ir.sparse import SparseWeight
from onnxslim_llm.ir.stored import MappedWeight, ProtoWeight
from onnxslim_llm.ir.values import variable
from onnxslim_llm.ir.weight import Weight

__all__ = ["InlineMap", "TensorReader", "describe", "read_function", "read_graph"]

_GRAPH_LISTS = frozenset(
    ["node", "initializer", "sparse_initializer", "input", "output", "value_info", "quantization_annotation"]
)
_FUNCTION_LISTS = frozenset(
    ["node", "input", "output", "value_info", "attribute", "attribute_proto", "opset_import", "doc_string"]
)
_NODE_LISTS = frozenset(["input", "output", "attribute"])
_RAW = frozenset(["raw_data"])


@dataclass(frozen=True)
class InlineMap:
    """How raw data that stayed in the model file is marked: `raw_data` is the mark, then offset and length."""

    mark: bytes
    file: MappedFile

    FORMAT = struct.Struct("<QQ")

    def find(self, proto: TensorProto) -> tuple[int, int] | None:
        """Return (offset, length) in the model file, or None if the tensor's data is really in the proto."""
        if not proto.HasField("raw_data"):
            return None
        raw = proto.raw_data
        if len(raw) != len(self.mark) + self.FORMAT.size or not raw.startswith(self.mark):
            return None
        offset, length = self.FORMAT.unpack_from(raw, len(self.mark))
        return offset, length


class TensorReader:
    """Makes weights of TensorProtos.

    Args:
        files: The external files of the model.
        inline: Set if large raw data stayed in the model file.
        weights: Weights for stubs, by location; see `Model.to_stub`.
    """

    def __init__(
        self, files: ExternalFiles, inline: InlineMap | None = None, weights: Mapping[str, Weight] | None = None
    ) -> None:
        self._files = files
        self._inline = inline
        self._weights = weights or {}

    def constant(self, proto: TensorProto) -> gs.Constant:
        """Return a constant that holds the tensor's weight; checks sizes, reads nothing large.

        Raises:
            ModelError: The data is missing or does not fit the shape.
        """
        weight, skeleton = self.weight(proto)
        location = int(proto.data_location) if proto.HasField("data_location") else None
        result = gs.Constant(proto.name, weight, data_location=location)
        result.skeleton = skeleton
        return result

    def sparse(self, proto: onnx.SparseTensorProto) -> gs.Constant:
        """Return a constant that holds a sparse initializer; its name is that of its values."""
        values, indices = self.weight(proto.values)[0], self.weight(proto.indices)[0]
        return gs.Constant(proto.values.name, SparseWeight(proto, values, indices))

    def weight(self, proto: TensorProto) -> tuple[Weight, TensorProto]:
        """Return the weight and the proto to write it back with."""
        if proto.data_location == TensorProto.EXTERNAL:
            for entry in proto.external_data:
                if entry.key == "location" and entry.value in self._weights:
                    return self._weights[entry.value], proto
            return self._files.weight(proto), proto
        place = self._inline.find(proto) if self._inline is not None else None
        if place is not None and self._inline is not None:
            offset, length = place
            skeleton = copy_without(proto, _RAW)
            _check_length(proto, length)
            return MappedWeight(self._inline.file, offset, tuple(proto.dims), proto.data_type, None), skeleton
        _check_inline(proto)
        return ProtoWeight(proto), proto


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
        if not isinstance(found, gs.Variable) or entry.name not in scope.local:
            skeleton.outputs[id(found)] = entry
        outputs.append(found)
    skeleton.value_info = [(entry, scope.local.get(entry.name)) for entry in proto.value_info]
    for annotation in proto.quantization_annotation:
        names = [annotation.tensor_name, *(item.value for item in annotation.quant_parameter_tensor_names)]
        skeleton.annotations.append((annotation, {name: scope.local[name] for name in names if name in scope.local}))
    graph = gs.Graph(nodes=nodes, inputs=inputs, outputs=outputs, name=proto.name, doc_string=proto.doc_string)
    graph.skeleton = skeleton
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
        import_domains=[_copy(item) for item in proto.opset_import],
        attrs=attributes,
    )
    value_info = [(entry, scope.local.get(entry.name)) for entry in proto.value_info]
    function.skeleton = FunctionSkeleton(copy_without(proto, _FUNCTION_LISTS), skeletons, value_info)
    return function


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
    protos: list[onnx.NodeProto],
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
            raise ModelError(f"attribute '{attribute.name}' is given twice", where=describe(proto))
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
            todo="the model is invalid (not in SSA form): export it again",
        )
    scope.local[tensor.name] = tensor


def _unproduced(name: str, what: str) -> ModelError:
    return ModelError(
        f"tensor '{name}' is never produced",
        where=f"it is {what}",
        todo="the model is invalid: export it again, or add the missing input or initializer",
    )


def _check_inline(proto: TensorProto) -> None:
    # Reading raw_data copies it out of the message: its length is told by what the other fields leave.
    from onnxslim_llm.ir import dtypes

    if any(dim < 0 for dim in proto.dims):
        raise ModelError(f"negative dimension in {list(proto.dims)}", where=f"tensor '{proto.name}'")
    if proto.HasField("segment") or dtypes.numpy_dtype(proto.data_type) is None:
        return
    if proto.data_type == TensorProto.STRING:
        count, stored, unit = ProtoWeight(proto).size, len(proto.string_data), "strings"
    elif proto.HasField("raw_data"):
        _check_length(proto, len(proto.raw_data))
        return
    else:
        count, stored, unit = _typed_counts(proto)
    if count != stored:
        raise _misfit(proto, f"{stored} {unit}", f"{count}")


def _typed_counts(proto: TensorProto) -> tuple[int, int, str]:
    from onnx import helper

    from onnxslim_llm.ir import dtypes

    field = helper.tensor_dtype_to_field(proto.data_type)
    stored = len(getattr(proto, field))
    count = 1
    for dim in proto.dims:
        count *= dim
    if proto.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
        count *= 2
    elif dtypes.bits_of(proto.data_type) in (2, 4):
        count = dtypes.packed_nbytes(proto.dims, proto.data_type)
    return count, stored, f"values in {field}"


def _check_length(proto: TensorProto, length: int) -> None:
    from onnxslim_llm.ir import dtypes

    if dtypes.numpy_dtype(proto.data_type) is None or proto.data_type == TensorProto.STRING:
        return
    needed = dtypes.packed_nbytes(proto.dims, proto.data_type)
    if needed != length:
        raise _misfit(proto, f"{length} bytes", f"{needed}")


def _misfit(proto: TensorProto, has: str, wants: str) -> ModelError:
    from onnxslim_llm.ir import dtypes

    return ModelError(
        f"a tensor's data does not fit its shape: {has}, {wants} wanted",
        where=f"tensor '{proto.name}', {dtypes.dtype_name(proto.data_type)} {list(proto.dims)}",
        todo="the file is broken: download it or export it again",
    )


def _copy(item: onnx.OperatorSetIdProto) -> onnx.OperatorSetIdProto:
    copy = onnx.OperatorSetIdProto()
    copy.CopyFrom(item)
    return copy


ReadTensor = Callable[[TensorProto], gs.Constant]
