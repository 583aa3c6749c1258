"""Arithmetic of sizes: what broadcasting, slicing and reshaping make of expressions.

Every function returns None (or None inside a shape) for what is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnxslim_llm.ir.shapes.dims import Dim, divide, is_nonnegative, product

__all__ = ["TO_THE_END", "broadcast", "meet", "quotient", "slice_size"]

#: Slice ends from here on mean "to the end"; exporters write INT32_MAX or INT64_MAX.
TO_THE_END = 2**31 - 1


def broadcast(*shapes: tuple[Dim, ...] | None) -> tuple[Dim | None, ...] | None:
    """Return the shape that numpy broadcasting gives; two different symbols meet in an unknown size."""
    if any(s is None for s in shapes):
        return None
    known = [s for s in shapes if s is not None]
    rank = max((len(s) for s in known), default=0)
    result: list[Dim | None] = []
    for axis in range(-rank, 0):
        size: Dim | None = 1
        for shape in known:
            dim = shape[axis] if -axis <= len(shape) else 1
            size = meet(size, dim)
        result.append(size)
    return tuple(result)


def meet(a: Dim | None, b: Dim) -> Dim | None:
    """Return the size that two sizes of one axis broadcast to; two different symbols may be 1 or equal."""
    if a is None:
        return b if isinstance(b, int) and b != 1 else None
    if a == b or b == 1:
        return a
    if a == 1:
        return b
    if isinstance(a, int):
        return a
    return b if isinstance(b, int) else None


def slice_size(size: Dim, start: Any, end: Any, step: Any) -> Dim | None:
    """Return the size of an axis after Slice, or None if it is not known."""
    if isinstance(size, int) and all(isinstance(v, int) for v in (start, end, step)):
        return len(range(*slice(start, end, step).indices(size))) if step else None
    if not isinstance(step, int) or step < 1 or start is None or end is None:
        return None
    first = _bound(start, size)
    last = size if isinstance(end, int) and end >= TO_THE_END else _bound(end, size)
    if first is None or last is None or not is_nonnegative(last - first):
        return None
    if step == 1:
        return last - first
    if not isinstance(start, int) or not 0 <= start < step or last != size:
        return None
    parts = divide(size, step)
    return parts if parts is not None and parts * step == size else None


def _bound(position: Any, size: Dim) -> Dim | None:
    """Return a slice bound counted from the start, if it surely lies within [0, size]."""
    if isinstance(position, int) and position < 0:
        position = size + position
    return position if is_nonnegative(position) and is_nonnegative(size - position) else None


def quotient(whole: Sequence[Dim], parts: Sequence[Dim]) -> Dim | None:
    """Return what -1 in a Reshape stands for: the product of `whole` over that of `parts`."""
    above, below = list(whole), list(parts)
    for part in parts:
        if part in above:
            above.remove(part)
            below.remove(part)
    quotient = divide(product(above), product(below))
    return quotient if quotient is not None and quotient * product(below) == product(above) else None
