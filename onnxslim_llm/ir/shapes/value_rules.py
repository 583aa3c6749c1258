"""How operators of the standard domain compute small integer contents, for `symbolic.SymbolicValues`.

A value is an object array with an int, a bool, an `Expr`, or None (unknown) in each place. numpy does the indexing and
broadcasting; the arithmetic is that of `Dim`s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.ir.shapes.dims import Dim, Expr, is_positive, product
from onnxslim_llm.ir.shapes.node_view import NodeView
from onnxslim_llm.ir.shapes.value_arithmetic import ARITHMETIC, Rule, Value, elementwise, object_array
from onnxslim_llm.ir.weights import dtypes

__all__ = ["VALUE_RULES"]

_INTEGERS = frozenset([TensorProto.INT64, TensorProto.INT32])


def _ints(value: Value) -> list[int] | None:
    if value is None or not all(isinstance(item, int) for item in value.reshape(-1)):
        return None
    return [int(item) for item in value.reshape(-1)]


def _shape(v: NodeView) -> Value:
    shape = v.shape()
    if shape is None:
        return None
    kept = shape[slice(v.attr("start", 0), v.attr("end"))]
    return object_array(list(kept), (len(kept),))


def _size(v: NodeView) -> Value:
    shape = v.shape()
    return None if shape is None else object_array([product(shape)], ())


def _gather(v: NodeView) -> Value:
    data, index = v.value(0), v.value(1)
    places = _ints(index)
    if data is None or index is None or places is None or data.ndim == 0:
        return None
    axis = int(v.attr("axis", 0))
    if any(not -data.shape[axis] <= p < data.shape[axis] for p in places):
        return None
    return np.asarray(np.take(data, np.array(places, np.int64).reshape(index.shape), axis=axis), object)


def _slice(v: NodeView) -> Value:
    data = v.value()
    if data is None:
        return None
    if "starts" in v.node.attrs:
        starts, ends = list(v.attr("starts")), list(v.attr("ends"))
        axes, steps = v.attr("axes"), None
    else:
        first, last = _ints(v.value(1)), _ints(v.value(2))
        axes, steps = v.ints("axes", 3), v.ints("steps", 4)
        if first is None or last is None or (axes is None and v.has(3)) or (steps is None and v.has(4)):
            return None
        starts, ends = first, last
    axes = list(axes) if axes is not None else list(range(len(starts)))
    steps = steps if steps is not None else [1] * len(starts)
    index = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # A negative step towards an end before the first element is spelled with a huge negative number.
        stop = None if step < 0 and end < -data.shape[axis] else end
        index[axis] = slice(start, stop, step)
    return data[tuple(index)]


def _concat(v: NodeView) -> Value:
    parts = [v.value(i) for i in range(len(v.node.inputs))]
    known = [p for p in parts if p is not None]
    if not known:
        return None
    axis = int(v.attr("axis", 0))
    if len(known) != len(parts):
        # Parts that nothing is known about but their length leave unknown places.
        parts = [p if p is not None else _blank(v.shape(i)) for i, p in enumerate(parts)]
        known = [p for p in parts if p is not None]
        if len(known) != len(parts):
            return None
    return np.concatenate(known, axis=axis)


def _blank(shape: tuple[Dim, ...] | None) -> Value:
    if shape is None or len(shape) != 1 or not isinstance(shape[0], int):
        return None
    return object_array([None] * shape[0], (shape[0],))


def _reshape(v: NodeView) -> Value:
    data, target = v.value(), _ints(v.value(1))
    if data is None or target is None or 0 in target:
        return None
    return data.reshape(target)


def _squeeze(v: NodeView) -> Value:
    data, axes = v.value(), v.ints("axes", 1)
    if data is None or (axes is None and v.has(1)):
        return None
    return data.squeeze() if axes is None else data.squeeze(tuple(axes))


def _unsqueeze(v: NodeView) -> Value:
    data, axes = v.value(), v.ints("axes", 1)
    return None if data is None or axes is None else np.expand_dims(data, tuple(axes))


def _identity(v: NodeView) -> Value:
    return v.value()


def _cast(v: NodeView) -> Value:
    data, to = v.value(), v.attr("to")
    if data is None or to is None:
        return None
    number = dtypes.onnx_dtype(to)
    if number in _INTEGERS:
        if any(isinstance(item, int) and not _fits(int(item), number) for item in data.reshape(-1)):
            return None
        return elementwise(lambda a: int(a) if isinstance(a, bool) else a, data)
    if number == TensorProto.BOOL:
        return elementwise(_truth, data)
    return None


def _fits(item: int, number: int) -> bool:
    info = np.iinfo(np.int32 if number == TensorProto.INT32 else np.int64)
    return info.min <= item <= info.max


def _truth(a: Any) -> bool | None:
    if isinstance(a, Expr):
        return True if is_positive(a) else None
    return bool(a)


def _expand(v: NodeView) -> Value:
    data, target = v.value(), _ints(v.value(1))
    if data is None or target is None:
        return None
    return np.broadcast_to(data, np.broadcast_shapes(data.shape, tuple(target)))


def _split(v: NodeView) -> list[Value] | None:
    data, count = v.value(), len(v.node.outputs)
    sizes = v.ints("split", 1)
    if data is None or data.ndim != 1 or (sizes is None and v.has(1)):
        return None
    if sizes is None:
        part = -(-data.size // count)
        sizes = [min(part, max(0, data.size - i * part)) for i in range(count)]
    return list(np.split(data, np.cumsum(sizes)[:-1]))


def _constant_of_shape(v: NodeView) -> Value:
    target, fill = _ints(v.value()), v.attr("value")
    if target is None or fill is None or math.prod(target) > _LIMIT:
        return None  # without the attribute the result is float
    filler = v.value_of(fill)
    return None if filler is None else object_array([filler.reshape(-1)[0]] * math.prod(target), tuple(target))


_LIMIT = 4096


def _constant(v: NodeView) -> Value:
    for name, content in v.node.attrs.items():
        if name == "value" and isinstance(content, gs.Constant):
            return v.value_of(content)
        if name == "value_int":
            return object_array([content], ())
        if name == "value_ints":
            return object_array(list(content), (len(content),))
    return None


def _range(v: NodeView) -> Value:
    numbers = [_ints(v.value(i)) for i in range(3)]
    if any(n is None or len(n) != 1 for n in numbers):
        return None
    first, limit, step = (n[0] for n in numbers if n)
    if step == 0 or len(range(first, limit, step)) > _LIMIT:
        return None
    items = list(range(first, limit, step))
    return object_array(items, (len(items),))


def _where(v: NodeView) -> Value:
    condition, yes, no = v.value(0), v.value(1), v.value(2)
    if condition is None or yes is None or no is None:
        return None

    def choose(c: Any, a: Any, b: Any) -> Any:
        if c is None:
            return a if a == b else None
        return a if c else b

    return elementwise(choose, condition, yes, no)


def _reduce(combine: Callable[[Any, Any], Any], start: int) -> Rule:
    def rule(v: NodeView) -> Value:
        data, axes = v.value(), v.ints("axes", 1)
        if data is None or data.ndim != 1 or (axes is None and v.has(1)):
            return None
        if not axes and v.attr("noop_with_empty_axes", 0):
            return data
        total: Any = start
        for item in data:
            total = None if total is None or item is None else combine(total, item)
        return object_array([total], (1,) if v.attr("keepdims", 1) else ())

    return rule


VALUE_RULES: dict[str, Rule] = {
    **ARITHMETIC,
    "Cast": _cast,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Gather": _gather,
    "Identity": _identity,
    "Range": _range,
    "ReduceProd": _reduce(lambda a, b: a * b, 1),
    "ReduceSum": _reduce(lambda a, b: a + b, 0),
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
