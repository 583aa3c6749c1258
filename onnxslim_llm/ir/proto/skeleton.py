"""What graphsurgeon objects cannot hold, kept beside them.

A skeleton is a piece of the proto as it was read, without the parts that graphsurgeon holds itself. It hangs on the
graphsurgeon object as the attribute `skeleton`, so that it moves with nodes and tensors. The writer starts from the
skeleton and changes only what differs from the object. Copies of a model share skeletons: never change one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from onnxslim_llm.ir.proto.wire import encode_varint

__all__ = [
    "FunctionSkeleton",
    "GraphSkeleton",
    "NodeSkeleton",
    "ValueSkeleton",
    "copy_without",
    "skeleton_of",
]

M = TypeVar("M", bound=Message)

_VARINT, _FIXED64, _BYTES, _GROUP, _FIXED32, _GROUP_END = 0, 1, 2, 3, 5, 4


def copy_without(message: M, drop: frozenset[str]) -> M:
    """Return a copy of `message` without the fields named in `drop`. Fields that this onnx does not know are kept.

    The dropped fields are never copied, however large they are.
    """
    copy: M = type(message)()
    for descriptor, value in message.ListFields():
        name = descriptor.name
        if name in drop:
            continue
        if hasattr(value, "extend"):
            getattr(copy, name).extend(value)
        elif isinstance(value, Message):
            target = getattr(copy, name)
            target.SetInParent()
            target.CopyFrom(value)
        else:
            setattr(copy, name, value)
    unknown = UnknownFieldSet(message)
    if len(unknown):
        copy.MergeFromString(_encode_unknown(unknown))
    return copy


def _encode_unknown(fields: UnknownFieldSet) -> bytes:
    out = bytearray()
    for entry in fields:
        out += encode_varint(entry.field_number << 3 | entry.wire_type)
        if entry.wire_type == _VARINT:
            out += encode_varint(entry.data)
        elif entry.wire_type == _FIXED64:
            out += entry.data.to_bytes(8, "little")
        elif entry.wire_type == _FIXED32:
            out += entry.data.to_bytes(4, "little")
        elif entry.wire_type == _GROUP:
            out += _encode_unknown(entry.data) + encode_varint(entry.field_number << 3 | _GROUP_END)
        else:
            out += encode_varint(len(entry.data)) + entry.data
    return bytes(out)


@dataclass(slots=True)
class NodeSkeleton:
    """Of a node: the proto without inputs, outputs and attributes; each attribute with the value read from it."""

    proto: onnx.NodeProto
    attributes: dict[str, tuple[onnx.AttributeProto, Any]]


@dataclass(slots=True)
class ValueSkeleton:
    """Of a variable: its entries among the graph's inputs, outputs and value_info, and the type read from them.

    Attributes:
        protos: By role: "input", "output", "info".
        known: (dtype, shape, kind of type) as read; as long as the variable still has them, the protos are valid.
    """

    protos: dict[str, onnx.ValueInfoProto]
    known: tuple[Any, tuple[Any, ...] | None, str]


@dataclass(slots=True)
class GraphSkeleton:
    """Of a graph: the proto without its lists of nodes and values, and the order in which values were listed.

    Attributes:
        proto: Name, doc string, metadata and unknown fields.
        initializers: Constants in the order read; sparse ones too.
        orphans: `id`s of initializers that nothing used; they are written back until a pass clears this set.
        inputs: (entry, tensor) in the order read, initializers that were listed as inputs included.
        outputs: (entry, tensor) in the order read.
        value_info: (entry, tensor) in the order read; the tensor is None for names that occur nowhere in the graph.
        annotations: (quantization annotation, tensors by name) in the order read.
    """

    proto: onnx.GraphProto
    initializers: list[gs.Constant] = field(default_factory=list)
    orphans: set[int] = field(default_factory=set)
    inputs: list[tuple[onnx.ValueInfoProto, gs.Tensor]] = field(default_factory=list)
    outputs: list[tuple[onnx.ValueInfoProto, gs.Tensor]] = field(default_factory=list)
    value_info: list[tuple[onnx.ValueInfoProto, gs.Tensor | None]] = field(default_factory=list)
    annotations: list[tuple[onnx.TensorAnnotation, dict[str, gs.Tensor]]] = field(default_factory=list)


@dataclass(slots=True)
class FunctionSkeleton:
    """Of a model-local function: the proto without its lists, its default attributes, and its value_info in order."""

    proto: onnx.FunctionProto
    attributes: dict[str, tuple[onnx.AttributeProto, Any]]
    value_info: list[tuple[onnx.ValueInfoProto, gs.Tensor | None]] = field(default_factory=list)


def skeleton_of(item: Any, kind: type[M] | type[Any]) -> Any:
    """Return the skeleton of a graphsurgeon object; None if it has none of this kind, e.g. because a pass made it."""
    # gs.Graph answers unknown attributes with a logged error, so look into the instance directly.
    found = item.__dict__.get("skeleton")
    return found if isinstance(found, kind) else None
