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
from numpy.typing import NDArray
from onnx import TensorProto

from onnxslim_llm.ir import dtypes
from onnxslim_llm.ir.dims import Dim, Expr, divide, is_nonnegative, is_positive, product
from onnxslim_llm.ir.shape_rules import NodeView

__all__ = ["VALUE_RULES"]

Value = NDArray[Any] | None
Rule = Callable[[NodeView], "Value | list[Value]"]

_INTEGERS = frozenset([TensorProto.INT64, TensorProto.INT32])
#: Largest value that a chain of shape arithmetic is followed to: beyond it, int64 would wrap around.
_LARGEST = 2**63 - 1


def _array(items: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    # np.array would take apart, or try to, whatever looks like a sequence.
    result = np.empty(len(items), object)
    result[:] = items
    return result.reshape(shape)


def _ints(value: Value) -> list[int] | None:
    if value is None or not all(isinstance(item, int) for item in value.reshape(-1)):
        return None
    return [int(item) for item in value.reshape(-1)]


def _shape(v: NodeView) -> Value:
    shape = v.shape()
    if shape is None:
        return None
    kept = shape[slice(v.attr("start", 0), v.attr("end"))]
    return _array(list(kept), (len(kept),))


def _size(v: NodeView) -> Value:
    shape = v.shape()
    return None if shape is None else _array([product(shape)], ())


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
    return _array([None] * shape[0], (shape[0],))


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
        return _elementwise(lambda a: int(a) if isinstance(a, bool) else a, data)
    if number == TensorProto.BOOL:
        return _elementwise(_truth, data)
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
    return None if filler is None else _array([filler.reshape(-1)[0]] * math.prod(target), tuple(target))


_LIMIT = 4096


def _constant(v: NodeView) -> Value:
    for name, content in v.node.attrs.items():
        if name == "value" and isinstance(content, gs.Constant):
            return v.value_of(content)
        if name == "value_int":
            return _array([content], ())
        if name == "value_ints":
            return _array(list(content), (len(content),))
    return None


def _range(v: NodeView) -> Value:
    numbers = [_ints(v.value(i)) for i in range(3)]
    if any(n is None or len(n) != 1 for n in numbers):
        return None
    first, limit, step = (n[0] for n in numbers if n)
    if step == 0 or len(range(first, limit, step)) > _LIMIT:
        return None
    items = list(range(first, limit, step))
    return _array(items, (len(items),))


def _where(v: NodeView) -> Value:
    condition, yes, no = v.value(0), v.value(1), v.value(2)
    if condition is None or yes is None or no is None:
        return None

    def choose(c: Any, a: Any, b: Any) -> Any:
        if c is None:
            return a if a == b else None
        return a if c else b

    return _elementwise(choose, condition, yes, no)


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
        return _array([total], (1,) if v.attr("keepdims", 1) else ())

    return rule


def _elementwise(function: Callable[..., Any], *values: NDArray[Any]) -> NDArray[Any]:
    shape = np.broadcast_shapes(*(value.shape for value in values))
    wide = [np.broadcast_to(value, shape).reshape(-1) for value in values]
    return _array([function(*items) for items in zip(*wide, strict=True)], shape)


def _operator(function: Callable[..., Any]) -> Rule:
    def guarded(*items: Any) -> Any:
        if any(item is None for item in items):
            return None
        result = function(*items)
        return None if isinstance(result, int) and abs(result) > _LARGEST else result

    def rule(v: NodeView) -> Value:
        values = [v.value(i) for i in range(len(v.node.inputs))]
        known = [value for value in values if value is not None]
        return _elementwise(guarded, *known) if known and len(known) == len(values) else None

    return rule


def _variadic(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def fold(*items: Any) -> Any:
        total = items[0]
        for item in items[1:]:
            total = None if total is None else function(total, item)
        return total

    return fold


def _div(a: Dim, b: Dim) -> Dim | None:
    if isinstance(a, int) and isinstance(b, int):
        if b == 0:
            return None
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)  # ONNX truncates
    return divide(a, b) if is_nonnegative(a) and is_nonnegative(b) else None


def _mod(a: Dim, b: Dim) -> Dim | None:
    return a % b if isinstance(a, int) and isinstance(b, int) and b else None


def _max(a: Dim, b: Dim) -> Dim | None:
    if is_nonnegative(a - b):
        return a
    return b if is_nonnegative(b - a) else None


def _min(a: Dim, b: Dim) -> Dim | None:
    if is_nonnegative(a - b):
        return b
    return a if is_nonnegative(b - a) else None


def _equal(a: Dim, b: Dim) -> bool | None:
    if a == b:
        return True
    return False if is_positive(a - b) or is_positive(b - a) else None


def _less(a: Dim, b: Dim) -> bool | None:
    if is_positive(b - a):
        return True
    return False if is_nonnegative(a - b) else None


def _less_or_equal(a: Dim, b: Dim) -> bool | None:
    greater = _less(b, a)
    return None if greater is None else not greater


VALUE_RULES: dict[str, Rule] = {
    "Abs": _operator(lambda a: a if is_nonnegative(a) else -a if is_nonnegative(-a) else None),
    "Add": _operator(lambda a, b: a + b),
    "And": _operator(lambda a, b: a and b),
    "Cast": _cast,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Div": _operator(_div),
    "Equal": _operator(_equal),
    "Expand": _expand,
    "Gather": _gather,
    "Greater": _operator(lambda a, b: _less(b, a)),
    "GreaterOrEqual": _operator(lambda a, b: _less_or_equal(b, a)),
    "Identity": _identity,
    "Less": _operator(_less),
    "LessOrEqual": _operator(_less_or_equal),
    "Max": _operator(_variadic(_max)),
    "Min": _operator(_variadic(_min)),
    "Mod": _operator(_mod),
    "Mul": _operator(lambda a, b: a * b),
    "Neg": _operator(lambda a: -a),
    "Not": _operator(lambda a: not a),
    "Or": _operator(lambda a, b: a or b),
    "Range": _range,
    "ReduceProd": _reduce(lambda a, b: a * b, 1),
    "ReduceSum": _reduce(lambda a, b: a + b, 0),
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": _operator(lambda a, b: a - b),
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
