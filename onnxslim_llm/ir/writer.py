"""graphsurgeon objects to protos: the skeleton as it was read, changed only where the object differs from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, defs

from onnxslim_llm.ir.attributes import write_attribute
from onnxslim_llm.ir.ownership import owned_constants
from onnxslim_llm.ir.skeleton import FunctionSkeleton, GraphSkeleton, NodeSkeleton, copy_without, skeleton_of
from onnxslim_llm.ir.sparse import SparseWeight
from onnxslim_llm.ir.stored import ProtoWeight
from onnxslim_llm.ir.values import write_value
from onnxslim_llm.ir.weight import Weight
from onnxslim_llm.ir.weights import weight_of

__all__ = ["Store", "Writer", "inline_store", "missing_imports", "used_domains", "write_header", "write_imports"]

Store = Callable[[TensorProto, Weight], None]
"""Fills the data of an initializer; name, type and shape are there already."""

_DATA = frozenset(
    ["dims", "data_type", "segment", "float_data", "int32_data", "string_data", "int64_data", "raw_data"]
) | {"double_data", "uint64_data", "external_data", "data_location"}
_SPARSE_PARTS = frozenset(["values", "indices"])


def inline_store(out: TensorProto, weight: Weight) -> None:
    """Put the content into the proto itself."""
    if out.data_type == TensorProto.STRING:
        out.string_data.extend(weight.tensor.string_data)
    elif isinstance(weight, ProtoWeight):
        source = weight.proto
        for descriptor, value in source.ListFields():
            if descriptor.name.endswith("_data"):
                if descriptor.name == "raw_data":
                    out.raw_data = value
                elif descriptor.name != "external_data":
                    getattr(out, descriptor.name).extend(value)
    else:
        out.raw_data = bytes(weight.raw())
        weight.release()


def write_header(out: TensorProto, constant: gs.Constant, weight: Weight) -> None:
    """Write everything of a tensor but its data: name, type, shape, doc string and metadata."""
    proto = skeleton_of(constant, TensorProto)
    if proto is not None:
        out.CopyFrom(copy_without(proto, _DATA))
    out.dims.extend(weight.shape)
    out.data_type = weight.onnx_dtype
    if out.name != constant.name or (proto is None and constant.name):
        out.name = constant.name


class Writer:
    """Writes graphs and functions.

    Args:
        store: Fills the data of initializers. Tensors in attributes and sparse initializers are always written inline.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def graph(self, out: onnx.GraphProto, graph: gs.Graph, outer: frozenset[int] = frozenset()) -> None:
        """Fill `out` with a graph.

        Raises:
            ModelError: An attribute cannot be written.
            CompilerBug: Two constants have one name.
        """
        skeleton: GraphSkeleton | None = skeleton_of(graph, GraphSkeleton)
        if skeleton is not None:
            out.CopyFrom(skeleton.proto)
        _assign(out, "name", graph.name)
        _assign(out, "doc_string", graph.doc_string)
        constants = owned_constants(graph, outer)
        inner = outer | {id(constant) for constant in constants}
        for node in graph.nodes:
            self._node(out.node.add(), node, inner)
        for constant in constants:
            if isinstance(weight_of(constant), SparseWeight):
                self._sparse(out.sparse_initializer.add(), constant)
            else:
                self.tensor(out.initializer.add(), constant, self._store)
        _write_values(out, graph, skeleton, constants)

    def function(self, out: onnx.FunctionProto, function: gs.Function) -> None:
        """Fill `out` with a model-local function. New constants in its body become Constant nodes at its head.

        Raises:
            ModelError: An attribute cannot be written.
        """
        skeleton: FunctionSkeleton | None = skeleton_of(function, FunctionSkeleton)
        if skeleton is not None:
            out.CopyFrom(skeleton.proto)
        _assign(out, "name", function.name)
        _assign(out, "domain", function.domain or "")
        _assign(out, "doc_string", function.doc_string)
        out.input.extend(tensor.name for tensor in function.inputs)
        out.output.extend(tensor.name for tensor in function.outputs)
        defaults = {} if skeleton is None else skeleton.attributes
        for name, value in function.attrs.items():
            if value is None:
                out.attribute.append(name)
            else:
                self._attribute(out.attribute_proto.add(), name, value, defaults.get(name), frozenset())
        constants = owned_constants(function)
        inner = frozenset(id(constant) for constant in constants)
        for constant in constants:
            head = out.node.add(op_type="Constant", output=[constant.name])
            self.tensor(head.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t, constant, inline_store)
        for node in function.nodes:
            self._node(out.node.add(), node, inner)
        write_imports(out.opset_import, function)
        if skeleton is not None:
            alive = _alive(function, [])
            for entry, tensor in skeleton.value_info:
                if tensor is None:
                    out.value_info.add().CopyFrom(entry)
                elif id(tensor) in alive and isinstance(tensor, gs.Variable):
                    write_value(out.value_info.add(), tensor, "info", entry)

    def tensor(self, out: TensorProto, constant: gs.Constant, store: Store) -> None:
        """Fill `out` with a constant; as it was read if its content is still the same."""
        weight = weight_of(constant)
        proto = skeleton_of(constant, TensorProto)
        if store is inline_store and isinstance(weight, ProtoWeight) and (proto is None or weight.proto is proto):
            out.CopyFrom(weight.proto)
            _assign(out, "name", constant.name)
            return
        write_header(out, constant, weight)
        store(out, weight)

    def _sparse(self, out: onnx.SparseTensorProto, constant: gs.Constant) -> None:
        weight = weight_of(constant)
        assert isinstance(weight, SparseWeight)
        out.CopyFrom(copy_without(weight.proto, _SPARSE_PARTS))
        for part, source, content in (
            (out.values, weight.proto.values, weight.sparse_values),
            (out.indices, weight.proto.indices, weight.sparse_indices),
        ):
            named = gs.Constant(source.name, content)
            named.skeleton = source
            part.SetInParent()
            self.tensor(part, named, inline_store)
        _assign(out.values, "name", constant.name)

    def _node(self, out: onnx.NodeProto, node: gs.Node, outer: frozenset[int]) -> None:
        skeleton: NodeSkeleton | None = skeleton_of(node, NodeSkeleton)
        if skeleton is not None:
            out.CopyFrom(skeleton.proto)
        out.input.extend([tensor.name for tensor in node.inputs])
        out.output.extend([tensor.name for tensor in node.outputs])
        _assign(out, "name", node.name or "")
        _assign(out, "op_type", node.op)
        _assign(out, "domain", node.domain or "")
        known = {} if skeleton is None else skeleton.attributes
        for name, value in node.attrs.items():
            if value is not None:
                self._attribute(out.attribute.add(), name, value, known.get(name), outer, node)

    def _attribute(
        self,
        out: onnx.AttributeProto,
        name: str,
        value: Any,
        skeleton: tuple[onnx.AttributeProto, Any] | None,
        outer: frozenset[int],
        node: gs.Node | None = None,
    ) -> None:
        kind = None
        if node is not None and (isinstance(value, list | tuple | int)) and skeleton is None:
            kind = _schema_kind(node.op, node.domain or "", name)
        write_attribute(
            out,
            name,
            value,
            skeleton,
            lambda proto, constant: self.tensor(proto, constant, inline_store),
            lambda proto, graph: self.graph(proto, graph, outer),
            kind,
        )


def _write_values(
    out: onnx.GraphProto, graph: gs.Graph, skeleton: GraphSkeleton | None, constants: list[gs.Constant]
) -> None:
    stored = {id(constant) for constant in constants}
    for tensor, entry in _inputs_in_order(graph, skeleton, stored):
        write_value(out.input.add(), tensor, "input", entry)
    for tensor in graph.outputs:
        write_value(out.output.add(), tensor, "output", None if skeleton is None else skeleton.outputs.get(id(tensor)))
    alive = _alive(graph, constants)
    listed = {id(tensor) for tensor in graph.inputs} | {id(tensor) for tensor in graph.outputs}
    if skeleton is not None:
        for entry, tensor in skeleton.value_info:
            if tensor is None:
                out.value_info.add().CopyFrom(entry)
            elif id(tensor) in alive and (isinstance(tensor, gs.Variable) or id(tensor) in stored):
                write_value(out.value_info.add(), tensor, "info", entry)
                listed.add(id(tensor))
        for annotation, tensors in skeleton.annotations:
            _write_annotation(out, annotation, tensors, alive)
    for node in graph.nodes:
        for tensor in node.outputs:
            if tensor.name and id(tensor) not in listed and isinstance(tensor, gs.Variable):
                if tensor.dtype is not None or tensor.shape is not None:
                    write_value(out.value_info.add(), tensor, "info")
                listed.add(id(tensor))


def _inputs_in_order(
    graph: gs.Graph, skeleton: GraphSkeleton | None, stored: set[int]
) -> Iterable[tuple[gs.Tensor, onnx.ValueInfoProto | None]]:
    # Initializers that were listed as inputs follow the input that they followed before.
    after: dict[int | None, list[tuple[gs.Tensor, onnx.ValueInfoProto]]] = {}
    present = {id(tensor) for tensor in graph.inputs}
    previous: int | None = None
    for entry, tensor in [] if skeleton is None else skeleton.inputs:
        if id(tensor) in present:
            previous = id(tensor)
        elif id(tensor) in stored:
            after.setdefault(previous, []).append((tensor, entry))
    yield from after.get(None, [])
    for tensor in graph.inputs:
        yield tensor, None
        yield from after.get(id(tensor), [])


def _write_annotation(
    out: onnx.GraphProto, annotation: onnx.TensorAnnotation, tensors: dict[str, gs.Tensor], alive: set[int]
) -> None:
    subject = tensors.get(annotation.tensor_name)
    if subject is not None and id(subject) not in alive:
        return
    written = out.quantization_annotation.add()
    written.CopyFrom(annotation)
    if subject is not None:
        _assign(written, "tensor_name", subject.name)
    for item in written.quant_parameter_tensor_names:
        parameter = tensors.get(item.value)
        if parameter is not None:
            _assign(item, "value", parameter.name)


def _alive(graph: gs.Graph, constants: list[gs.Constant]) -> set[int]:
    alive = {id(tensor) for tensor in (*graph.inputs, *graph.outputs, *constants)}
    for node in graph.nodes:
        alive.update(map(id, node.inputs))
        alive.update(map(id, node.outputs))
    return alive


def used_domains(graph: gs.Graph) -> dict[str, None]:
    """Return the operator domains of a graph and its subgraphs, in the order of their first use; "ai.onnx" is ""."""
    found: dict[str, None] = {}
    for node in graph.nodes:
        found.setdefault(_canonical(node.domain or ""))
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                found.update(used_domains(value))
    return found


def missing_imports(graph: gs.Graph) -> list[onnx.OperatorSetIdProto]:
    """Return opset imports for the domains that a graph or function uses and does not import.

    Standard domains get the version that the installed onnx knows, all others version 1.
    """
    declared = {_canonical(item.domain) for item in graph.import_domains or []}
    missing = [domain for domain in used_domains(graph) if domain not in declared]
    known = {} if not missing else _standard_versions()
    return [
        onnx.OperatorSetIdProto(domain=domain, version=known.get(domain, 1) if domain else graph.opset)
        for domain in missing
    ]


def write_imports(out: Any, graph: gs.Graph) -> None:
    """Fill an `opset_import` field; domains that are used but not imported are added."""
    for item in [*(graph.import_domains or []), *missing_imports(graph)]:
        written = out.add()
        written.CopyFrom(item)
        if not _canonical(item.domain) and item.version != graph.opset:
            written.version = graph.opset


def _standard_versions() -> dict[str, int]:
    versions: dict[str, int] = {}
    for schema in defs.get_all_schemas():
        versions[schema.domain] = max(versions.get(schema.domain, 1), schema.since_version)
    return versions


def _schema_kind(operator: str, domain: str, name: str) -> int | None:
    if not defs.has(operator, domain):
        return None
    attribute = defs.get_schema(operator, domain).attributes.get(name)
    return None if attribute is None else int(getattr(onnx.AttributeProto, attribute.type.name))


def _canonical(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _assign(message: Any, field: str, value: Any) -> None:
    # Keeps the difference between a field that is absent and one that is empty.
    if getattr(message, field) != value:
        setattr(message, field, value)
