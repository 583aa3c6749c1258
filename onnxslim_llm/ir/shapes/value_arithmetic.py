"""Element-wise arithmetic, comparisons and logic on small integer contents; see `value_rules`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.ir.shapes.dims import Dim, divide, is_nonnegative, is_positive
from onnxslim_llm.ir.shapes.node_view import NodeView

__all__ = ["ARITHMETIC", "Rule", "Value", "elementwise", "object_array"]

Value = NDArray[Any] | None
Rule = Callable[[NodeView], "Value | list[Value]"]

#: Largest value that arithmetic is followed to: beyond it, int64 would wrap around.
_LARGEST = 2**63 - 1


def object_array(items: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return an object array of this shape with these items."""
    # np.array would take apart, or try to, whatever looks like a sequence.
    result = np.empty(len(items), object)
    result[:] = items
    return result.reshape(shape)


def elementwise(function: Callable[..., Any], *values: NDArray[Any]) -> NDArray[Any]:
    """Apply a function to the items of arrays, broadcast like numpy does."""
    shape = np.broadcast_shapes(*(value.shape for value in values))
    wide = [np.broadcast_to(value, shape).reshape(-1) for value in values]
    return object_array([function(*items) for items in zip(*wide, strict=True)], shape)


def _operator(function: Callable[..., Any]) -> Rule:
    def guarded(*items: Any) -> Any:
        if any(item is None for item in items):
            return None
        result = function(*items)
        return None if isinstance(result, int) and abs(result) > _LARGEST else result

    def rule(v: NodeView) -> Value:
        values = [v.value(i) for i in range(len(v.node.inputs))]
        known = [value for value in values if value is not None]
        return elementwise(guarded, *known) if known and len(known) == len(values) else None

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


ARITHMETIC: dict[str, Rule] = {
    "Abs": _operator(lambda a: a if is_nonnegative(a) else -a if is_nonnegative(-a) else None),
    "Add": _operator(lambda a, b: a + b),
    "And": _operator(lambda a, b: a and b),
    "Div": _operator(_div),
    "Equal": _operator(_equal),
    "Greater": _operator(lambda a, b: _less(b, a)),
    "GreaterOrEqual": _operator(lambda a, b: _less_or_equal(b, a)),
    "Less": _operator(_less),
    "LessOrEqual": _operator(_less_or_equal),
    "Max": _operator(_variadic(_max)),
    "Min": _operator(_variadic(_min)),
    "Mod": _operator(_mod),
    "Mul": _operator(lambda a, b: a * b),
    "Neg": _operator(lambda a: -a),
    "Not": _operator(lambda a: not a),
    "Or": _operator(lambda a, b: a or b),
    "Sub": _operator(lambda a, b: a - b),
}
