"""Types of values: ValueInfoProto to and from `dtype`, `shape` and `type` of a gs.Variable.

Tensors and sequences of tensors are what graphsurgeon can say; of all other types (optional, map, sparse, opaque) the
variable only knows the kind, and the proto is kept as it is.
"""

from __future__ import annotations

from typing import Any

import onnx_graphsurgeon as gs
from onnx import TensorProto, TypeProto, ValueInfoProto
from onnx_graphsurgeon.ir.tensor import SparseValues

from onnxslim_llm.ir.proto.skeleton import ValueSkeleton, copy_without, skeleton_of
from onnxslim_llm.ir.weights import dtypes

__all__ = ["assign", "read_type", "variable", "write_value"]

_ROLES = ("input", "output", "info")
_TYPE = frozenset(["type"])


def variable(name: str, protos: dict[str, ValueInfoProto]) -> gs.Variable:
    """Make a variable from its entries by role ("input", "output", "info"); the best informed entry says the type."""
    if not protos:
        return gs.Variable(name)
    known: tuple[Any, tuple[Any, ...] | None, str] = (None, None, "tensor_type")
    for role in _ROLES:
        if role in protos:
            read = read_type(protos[role].type)
            if known[0] is None or (known[1] is None and read[1] is not None):
                known = read if read[0] is not None or known[0] is None else known
    dtype, shape, kind = known
    result = gs.Variable(name, dtype=dtype, shape=None if shape is None else list(shape), type=kind)
    result.skeleton = ValueSkeleton(protos, known)
    return result


def read_type(proto: TypeProto) -> tuple[Any, tuple[Any, ...] | None, str]:
    """Return (dtype or None, dimensions as int, name or None each, kind of type) of a TypeProto."""
    kind = proto.WhichOneof("value") or "tensor_type"
    tensor = _tensor_type(proto)
    if tensor is None:
        return None, None, kind
    dtype = (dtypes.numpy_dtype(tensor.elem_type) or tensor.elem_type) if tensor.elem_type else None
    shape = None
    if tensor.HasField("shape"):
        shape = tuple(
            dim.dim_param if dim.HasField("dim_param") else dim.dim_value if dim.HasField("dim_value") else None
            for dim in tensor.shape.dim
        )
    return dtype, shape, kind


def write_value(out: ValueInfoProto, tensor: gs.Tensor, role: str, base: ValueInfoProto | None = None) -> None:
    """Fill `out` with the entry of a tensor in a role; as it was read, unless name, dtype or shape differ now."""
    skeleton: ValueSkeleton | None = skeleton_of(tensor, ValueSkeleton)
    if base is None and skeleton is not None:
        base = skeleton.protos.get(role)
        if base is None and skeleton.protos:
            base = next(skeleton.protos[other] for other in _ROLES if other in skeleton.protos)
    is_constant = isinstance(tensor, gs.Constant)
    now = (
        tensor.dtype,
        None if tensor.shape is None else tuple(tensor.shape),
        "tensor_type" if is_constant else tensor.type,
    )
    if base is not None:
        if is_constant:
            before = _constant_as_read(tensor, now, base)
        else:
            before = read_type(base.type) if skeleton is None else skeleton.known
        if _same(now, before):
            out.CopyFrom(base)
        else:
            out.CopyFrom(copy_without(base, _TYPE))
            out.type.CopyFrom(_changed_type(base.type, now))
    elif now[0] is not None or now[1] is not None:
        out.type.CopyFrom(_changed_type(TypeProto(), now))
    if out.name != tensor.name or not out.HasField("name"):
        out.name = tensor.name


def _constant_as_read(tensor: gs.Constant, now: tuple[Any, ...], entry: ValueInfoProto) -> tuple[Any, ...]:
    # An entry may say less than the initializer, or something else: it stays as long as the initializer does.
    proto: TensorProto | None = skeleton_of(tensor, TensorProto)
    if proto is None:
        return now if isinstance(tensor._values, SparseValues) else read_type(entry.type)
    return dtypes.numpy_dtype(proto.data_type) or proto.data_type, tuple(proto.dims), "tensor_type"


def _same(now: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    if now[1:] != before[1:]:
        return False
    if now[0] is None or before[0] is None:
        return now[0] is before[0]
    return dtypes.onnx_dtype(now[0]) == dtypes.onnx_dtype(before[0])


def _changed_type(base: TypeProto, now: tuple[Any, tuple[Any, ...] | None, str]) -> TypeProto:
    dtype, shape, kind = now
    changed = TypeProto()
    changed.CopyFrom(base)
    if base.WhichOneof("value") != kind:
        changed = TypeProto()
        if kind == "sequence_type":
            changed.sequence_type.elem_type.tensor_type.SetInParent()
        elif kind == "sparse_tensor_type":
            changed.sparse_tensor_type.SetInParent()
        else:
            changed.tensor_type.SetInParent()
    tensor = _tensor_type(changed)
    if tensor is None:
        return changed
    if dtype is None:
        tensor.ClearField("elem_type")
    else:
        tensor.elem_type = dtypes.onnx_dtype(dtype)
    if shape is None:
        tensor.ClearField("shape")
    else:
        _write_shape(tensor, shape)
    return changed


def _write_shape(tensor: Any, shape: tuple[Any, ...]) -> None:
    tensor.shape.SetInParent()
    dims = tensor.shape.dim
    if len(dims) != len(shape):
        del dims[:]
        for _ in shape:
            dims.add()
    for dim, size in zip(dims, shape, strict=True):
        # The denotation of an axis stays.
        if isinstance(size, str):
            dim.dim_param = size
        elif size is None or int(size) < 0:
            dim.ClearField("dim_value")
            dim.ClearField("dim_param")
        else:
            dim.dim_value = int(size)


def _tensor_type(proto: TypeProto) -> Any:
    kind = proto.WhichOneof("value")
    if kind in ("tensor_type", "sparse_tensor_type"):
        return getattr(proto, kind)
    if kind == "sequence_type" and proto.sequence_type.elem_type.WhichOneof("value") == "tensor_type":
        return proto.sequence_type.elem_type.tensor_type
    return None


def assign(message: Any, field: str, value: Any) -> None:
    """Set a scalar field if its value differs; so a field that is absent stays different from one that is empty."""
    if getattr(message, field) != value:
        setattr(message, field, value)
