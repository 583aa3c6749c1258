"""Attributes of nodes and functions: AttributeProto to and from what graphsurgeon keeps in `Node.attrs`.

| AttributeProto               | in `Node.attrs`                         |
|------------------------------|-----------------------------------------|
| FLOAT, INT                   | float, int                              |
| STRING                       | str (bytes where it is not UTF-8)       |
| FLOATS, INTS, STRINGS        | list                                    |
| TENSOR                       | gs.Constant                             |
| GRAPH                        | gs.Graph                                |
| with ref_attr_name           | gs.Node.AttributeRef                    |
| all others, unknown ones too | the AttributeProto itself, left alone   |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, TensorProto
from onnx_graphsurgeon.util import misc

from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.proto.skeleton import copy_without
from onnxslim_llm.ir.weights import dtypes

__all__ = ["read_attribute", "write_attribute"]

_A = AttributeProto
_FIELDS: dict[int, str] = {
    _A.FLOAT: "f",
    _A.INT: "i",
    _A.STRING: "s",
    _A.FLOATS: "floats",
    _A.INTS: "ints",
    _A.STRINGS: "strings",
}
_FIELD_TYPES = {**{name: kind for kind, name in _FIELDS.items()}, "t": _A.TENSOR, "g": _A.GRAPH}
_VALUE_FIELDS = frozenset(["f", "i", "s", "t", "g", "sparse_tensor", "tp", "floats", "ints", "strings", "tensors"]) | {
    "graphs",
    "sparse_tensors",
    "type_protos",
}
_TENSOR_OR_GRAPH = frozenset(["t", "g"])


def read_attribute(
    proto: AttributeProto,
    read_tensor: Callable[[TensorProto], gs.Constant],
    read_graph: Callable[[onnx.GraphProto], gs.Graph],
) -> tuple[Any, tuple[AttributeProto, Any]]:
    """Return the value for `Node.attrs` and the skeleton: (the proto without tensor and graph, the value as read)."""
    kind = _kind(proto)
    if proto.ref_attr_name:
        try:
            reference = gs.Node.AttributeRef(proto.ref_attr_name, misc.convert_from_onnx_attr_type(proto.type))
        except KeyError:
            return proto, (proto, proto)
        return reference, (proto, (reference.name, reference.type))
    if kind == _A.TENSOR:
        tensor = read_tensor(proto.t)
        return tensor, (copy_without(proto, _TENSOR_OR_GRAPH), tensor)
    if kind == _A.GRAPH:
        graph = read_graph(proto.g)
        return graph, (copy_without(proto, _TENSOR_OR_GRAPH), graph)
    if kind not in _FIELDS:
        return proto, (proto, proto)
    value = getattr(proto, _FIELDS[kind])
    if kind == _A.STRING:
        text = _text(value)
        return text, (proto, text)
    if kind in (_A.FLOAT, _A.INT):
        return value, (proto, value)
    values = [_text(item) for item in value] if kind == _A.STRINGS else list(value)
    # A tuple: the list may be changed in place.
    return values, (proto, tuple(values))


def write_attribute(
    out: AttributeProto,
    name: str,
    value: Any,
    skeleton: tuple[AttributeProto, Any] | None,
    write_tensor: Callable[[TensorProto, gs.Constant], None],
    write_graph: Callable[[onnx.GraphProto, gs.Graph], None],
    default_kind: int | None = None,
) -> None:
    """Fill `out` with an attribute of this name and value.

    Args:
        out: An empty proto.
        name: Name of the attribute.
        value: Anything of the table above, as well as numpy scalars and arrays, dtypes (written as their ONNX number)
            and TensorProtos.
        skeleton: What `read_attribute` returned for this attribute of the same node, if it was read.
        write_tensor: Writes a constant into a TensorProto.
        write_graph: Writes a graph into a GraphProto.
        default_kind: Type of the attribute by the operator's schema, for values that do not say it (empty lists).

    Raises:
        ModelError: The value is of a type that attributes cannot have.
    """
    if isinstance(value, AttributeProto):
        out.CopyFrom(value)
        if out.name != name:
            out.name = name
        return
    if isinstance(value, np.ndarray):
        value = gs.Constant("", value)
    if isinstance(value, gs.Constant | gs.Graph):
        is_tensor = isinstance(value, gs.Constant)
        if skeleton is not None and isinstance(skeleton[1], gs.Constant if is_tensor else gs.Graph):
            out.CopyFrom(skeleton[0])
        else:
            out.type = _A.TENSOR if is_tensor else _A.GRAPH
        out.name = name
        if is_tensor:
            out.t.SetInParent()
            write_tensor(out.t, value)
        else:
            out.g.SetInParent()
            write_graph(out.g, value)
        return
    if skeleton is not None:
        proto, known = skeleton
        if _unchanged(value, known):
            out.CopyFrom(proto)
            return
        out.CopyFrom(copy_without(proto, _VALUE_FIELDS | {"type", "ref_attr_name"}))
        default_kind = proto.type or default_kind
    out.name = name
    _set_value(out, name, value, default_kind)


def _set_value(out: AttributeProto, name: str, value: Any, default_kind: int | None) -> None:
    if isinstance(value, gs.Node.AttributeRef):
        kind = misc.convert_to_onnx_attr_type(value.type)
        out.type = _A.UNDEFINED if kind is None else kind
        out.ref_attr_name = value.name
    elif isinstance(value, TensorProto):
        out.type = _A.TENSOR
        out.t.CopyFrom(value)
    else:
        kind, plain = _plain(name, value, default_kind)
        out.type = kind
        if kind in (_A.FLOATS, _A.INTS, _A.STRINGS):
            getattr(out, _FIELDS[kind]).extend(plain)
        else:
            setattr(out, _FIELDS[kind], plain)


def _plain(name: str, value: Any, default_kind: int | None) -> tuple[Any, Any]:
    if isinstance(value, type | np.dtype):
        try:
            value = dtypes.onnx_dtype(value)
        except TypeError as error:
            raise ModelError(f"attribute '{name}': {error}", where=f"attribute '{name}'") from error
    if isinstance(value, bool | int | np.bool_ | np.integer):
        return (_A.FLOAT, float(value)) if default_kind == _A.FLOAT else (_A.INT, int(value))
    if isinstance(value, float | np.floating):
        return _A.FLOAT, float(value)
    if isinstance(value, str | bytes):
        return _A.STRING, _bytes(value)
    if isinstance(value, list | tuple):
        items = list(value)
        if not items:
            if default_kind in (_A.FLOATS, _A.INTS, _A.STRINGS):
                return default_kind, []
        elif all(isinstance(item, bool | int | np.bool_ | np.integer) for item in items):
            numbers = [int(item) for item in items]
            return (_A.FLOATS, [float(item) for item in items]) if default_kind == _A.FLOATS else (_A.INTS, numbers)
        elif all(isinstance(item, bool | int | float | np.number | np.bool_) for item in items):
            return _A.FLOATS, [float(item) for item in items]
        elif all(isinstance(item, str | bytes) for item in items):
            return _A.STRINGS, [_bytes(item) for item in items]
    raise ModelError(
        f"attribute '{name}' has a value that ONNX cannot hold: {value!r}",
        where=f"attribute '{name}'",
        todo="use numbers, strings, lists of one of them, gs.Constant, gs.Graph or an AttributeProto",
    )


def _unchanged(value: Any, known: Any) -> bool:
    if isinstance(value, gs.Node.AttributeRef):
        return bool((value.name, value.type) == known)
    if isinstance(value, list | tuple):
        if not isinstance(known, tuple) or len(known) != len(value):
            return False
        return all(_unchanged(mine, theirs) for mine, theirs in zip(value, known, strict=True))
    # `is` lets a NaN be itself.
    return value is known or (type(value) is type(known) and bool(value == known))


def _kind(proto: AttributeProto) -> int:
    if proto.type != _A.UNDEFINED or proto.HasField("type"):
        return int(proto.type)
    # IR versions before 2 had no type field: the one field that is set says it.
    used = [descriptor.name for descriptor, _ in proto.ListFields() if descriptor.name in _FIELD_TYPES]
    return int(_FIELD_TYPES[used[0]]) if len(used) == 1 else int(_A.UNDEFINED)


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
