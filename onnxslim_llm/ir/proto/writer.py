"""graphsurgeon objects to protos: the skeleton as it was read, changed only where the object differs from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, defs

from onnxslim_llm.ir.ownership import owned_constants
from onnxslim_llm.ir.proto.attributes import write_attribute
from onnxslim_llm.ir.proto.imports import write_imports
from onnxslim_llm.ir.proto.skeleton import FunctionSkeleton, GraphSkeleton, NodeSkeleton, copy_without, skeleton_of
from onnxslim_llm.ir.proto.value_lists import Listing, alive_ids, write_values
from onnxslim_llm.ir.proto.values import assign, write_value
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.ir.weights.sparse import SparseWeight
from onnxslim_llm.ir.weights.stored import ProtoWeight
from onnxslim_llm.ir.weights.weight import Weight

__all__ = ["Store", "Writer", "inline_store"]

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


def _write_header(out: TensorProto, constant: gs.Constant, weight: Weight) -> None:
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

    def graph(
        self,
        out: onnx.GraphProto,
        graph: gs.Graph,
        outer: frozenset[int] = frozenset(),
        listing: Listing = "as read",
    ) -> None:
        """Fill `out` with a graph.

        Args:
            out: An empty proto.
            graph: A graph.
            outer: `id`s of constants that the graphs around it store.
            listing: Which initializers are listed as inputs.

        Raises:
            ModelError: An attribute cannot be written.
            CompilerBug: Two constants have one name.
        """
        skeleton: GraphSkeleton | None = skeleton_of(graph, GraphSkeleton)
        if skeleton is not None:
            out.CopyFrom(skeleton.proto)
        assign(out, "name", graph.name)
        assign(out, "doc_string", graph.doc_string)
        constants = owned_constants(graph, outer)
        inner = outer | {id(constant) for constant in constants}
        for node in graph.nodes:
            self._node(out.node.add(), node, inner)
        for constant in constants:
            if isinstance(weight_of(constant), SparseWeight):
                self._sparse(out.sparse_initializer.add(), constant)
            else:
                self.tensor(out.initializer.add(), constant, self._store)
        write_values(out, graph, skeleton, constants, listing)

    def function(self, out: onnx.FunctionProto, function: gs.Function) -> None:
        """Fill `out` with a model-local function. New constants in its body become Constant nodes at its head.

        Raises:
            ModelError: An attribute cannot be written.
        """
        skeleton: FunctionSkeleton | None = skeleton_of(function, FunctionSkeleton)
        if skeleton is not None:
            out.CopyFrom(skeleton.proto)
        assign(out, "name", function.name)
        assign(out, "domain", function.domain or "")
        assign(out, "doc_string", function.doc_string)
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
            alive = alive_ids(function, [])
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
            assign(out, "name", constant.name)
            return
        _write_header(out, constant, weight)
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
        assign(out.values, "name", constant.name)

    def _node(self, out: onnx.NodeProto, node: gs.Node, outer: frozenset[int]) -> None:
        skeleton: NodeSkeleton | None = skeleton_of(node, NodeSkeleton)
        if skeleton is not None:
            out.CopyFrom(skeleton.proto)
        out.input.extend([tensor.name for tensor in node.inputs])
        out.output.extend([tensor.name for tensor in node.outputs])
        assign(out, "name", node.name or "")
        assign(out, "op_type", node.op)
        assign(out, "domain", node.domain or "")
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


def _schema_kind(operator: str, domain: str, name: str) -> int | None:
    if not defs.has(operator, domain):
        return None
    attribute = defs.get_schema(operator, domain).attributes.get(name)
    return None if attribute is None else int(getattr(onnx.AttributeProto, str(attribute.type).rpartition(".")[2]))
