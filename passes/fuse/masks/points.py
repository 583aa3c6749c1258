"""Sizes and padding masks at which a mask is computed to find out what it means."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.ir.shapes.dims import Dim, Expr
from onnxslim_llm.rewrite.probe import Probe, size_at

__all__ = ["Axes", "Breaks", "Point", "all_masks", "break_points", "paddings", "points", "solve"]

#: Larger constants stand for windows of thousands: they are made small, so that the program's breaks come together.
SMALL_CONSTANT = 32
#: Constants from here on mean "to the end".
_END = 2**31 - 1
#: Tables with more rows are not computed as a whole: 4 M elements.
MAX_TABLE = 2048
#: Operators in which a number is compared with or added to positions (or chosen as one), so that it moves a break.
_MOVERS = frozenset(
    ["Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Add", "Sub", "Min", "Max", "Equal", "Where", "Trilu"]
)


@dataclass(frozen=True)
class Axes:
    """The sizes of an attention: batch, queries, past keys, and all keys, as expressions of the input sizes.

    Attributes:
        past: 0 if there is no cache.
        cross: The keys are another sequence than the queries.
    """

    batch: Dim
    queries: Dim
    past: Dim
    keys: Dim

    @property
    def cross(self) -> bool:
        """Whether the keys are another sequence than the queries and what came before them."""
        return self.keys != self.queries + self.past


@dataclass(frozen=True)
class Point:
    """Sizes by name, and what batch, queries and keys are there.

    Attributes:
        real: The program's own constants are taken, not the small ones in their place.
    """

    sizes: Mapping[str, int]
    batch: int
    queries: int
    keys: int
    real: bool = True


@dataclass(frozen=True)
class Breaks:
    """Where a program's truths may change, beyond small sizes.

    Attributes:
        replaced: Small values to take instead of large constants, by `id` of the tensor, in the same order and with
            the same small differences.
        stands_for: The large constants by the small value that stands for them.
        constants: All constants that are compared or added, the large ones as they are.
        tables: Sizes of constant tables, and large constants that are neither compared nor added: ends of slices and
            ranges. Beyond them, nothing may come out.
    """

    replaced: dict[int, NDArray[Any]]
    stands_for: dict[int, int]
    constants: list[int]
    tables: list[int]


def break_points(probe: Probe) -> Breaks:
    """Return where the program's truths may change."""
    numbers: dict[int, int] = {}  # id of a tensor -> its value
    tables: set[int] = set()
    others: set[int] = set()  # elements of small vectors
    for tensor in probe.constants:
        value = probe.known(tensor)
        moves = any(node.op in _MOVERS for node in tensor.outputs if any(node is n for n in probe.nodes))
        if value.size > SMALL_CONSTANT:
            tables.update(dim for dim in value.shape if dim > 1)
            continue
        found = [abs(int(n)) for n in value.reshape(-1) if value.dtype.kind != "b" and abs(n) < _END]
        if not moves:
            tables.update(n for n in found if n > SMALL_CONSTANT)
        elif value.size == 1 and found:
            numbers[id(tensor)] = found[0]
        else:
            others.update(found)
    large = sorted({n for n in numbers.values() if SMALL_CONSTANT < n < _END})
    small = max([0, *(n for n in numbers.values() if n <= SMALL_CONSTANT)]) + 6
    stands_for: dict[int, int] = {}
    for i, number in enumerate(large):
        small += min(number - large[i - 1], 6) if i else 0
        stands_for[small] = number
    small_of = {number: small for small, number in stands_for.items()}
    replaced = {}
    for tensor in probe.constants:
        number = numbers.get(id(tensor), 0)
        if number in small_of:
            value = probe.known(tensor)
            replaced[id(tensor)] = np.full_like(
                value, small_of[number] if value.reshape(-1)[0] > 0 else -small_of[number]
            )
    return Breaks(replaced, stands_for, sorted({*numbers.values(), *others}), sorted(tables))


def points(axes: Axes, free: Mapping[str, Dim | None], breaks: Breaks) -> Iterator[Point]:
    """Yield the points.

    Args:
        axes: The sizes of the attention.
        free: What symbols that occur nowhere in `axes` are; None for those of which nothing is known.
        breaks: The program's constants and tables.
    """
    large = [n for n in breaks.constants if SMALL_CONSTANT < n < _END]
    near = [n for n in breaks.constants if 5 < n <= SMALL_CONSTANT] + list(breaks.stands_for)
    plan = [(2, s, p, False) for s in range(1, 6) for p in range(5)]
    plan += [(b, s, p, False) for b in (1, 3) for s, p in ((1, 0), (2, 0), (3, 2), (1, 4))]
    plan += [(2, s, p, False) for s, p in ((7, 11), (1, 37), (13, 0), (2, 29))]
    for number in near:
        plan += [(1, s, number + d, False) for s in (1, 3) for d in (-2, -1, 0, 1)]
        plan += [(1, number + d, p, False) for d in (-1, 0, 1, 2) for p in (0, 1)]
    plan += [(1, s, n + d, True) for n in large for s in (1, 3) for d in (-2, 0, 1)]
    for rows in breaks.tables:
        plan += [(1, rows, 0, True)] if rows <= MAX_TABLE else []
        plan += [(1, s, rows + d, True) for s in (1, 3) for d in (-s, 1)]
    tried = set()
    for batch, queries, past, real in plan:
        point = solve(axes, free, batch, queries, past, real)
        key = None if point is None else (*sorted(point.sizes.items()), point.real)
        if point is not None and key not in tried:
            tried.add(key)
            yield point


def solve(
    axes: Axes, free: Mapping[str, Dim | None], batch: int, queries: int, past: int, real: bool = False
) -> Point | None:
    """Return the point with these sizes; fixed sizes of the model win."""
    sizes: dict[str, int] = {}
    wanted = [(axes.batch, batch), (axes.queries, queries), (axes.past, past)]
    if axes.cross:
        wanted.append((axes.keys, past + 2))
    for dim, size in wanted:
        if isinstance(dim, Expr):
            name = _single_symbol(dim)
            if name is None:
                return None
            sizes.setdefault(name, size)
    for i, (name, known) in enumerate(free.items()):
        # A size that nothing here depends on: a different one at every point, so that it would show if something did.
        number = (7 * batch + 5 * queries + 3 * past + i) % 11 + 1 if known is None else size_at(known, sizes)
        if number is None:
            return None
        sizes.setdefault(name, number)
    found = [size_at(dim, sizes) for dim in (axes.batch, axes.queries, axes.keys)]
    if found[0] is None or found[1] is None or found[2] is None:
        return None
    return Point(sizes, found[0], found[1], found[2], real)


def _single_symbol(dim: Expr) -> str | None:
    if len(dim.terms) == 1 and dim.terms[0][1] == 1 and len(dim.terms[0][0]) == 1:
        return dim.terms[0][0][0]
    return None


def paddings(tensor: gs.Variable, rows: int, keys: int, breaks: list[int]) -> Iterator[tuple[NDArray[Any], bool]]:
    """Yield padding masks [B, T], and whether each is all ones.

    Args:
        tensor: The graph input, for its type.
        rows: B.
        keys: T.
        breaks: The program's constants; they and their neighbours are tried as entries.
    """
    dtype = np.dtype(tensor.dtype)
    yield np.ones((rows, keys), dtype), True
    rng = np.random.default_rng(rows * 1000 + keys)
    yield rng.integers(0, 2, (rows, keys)).astype(dtype), False
    left = np.arange(keys)[None, :] >= rng.integers(0, keys + 1, rows)[:, None]
    yield left.astype(dtype), False
    if dtype.kind != "b":
        odd = sorted({-1, 0, 1, 2, *(n + d for n in breaks if n < _END for d in (-1, 0, 1))})
        entries = np.array([*odd, 0.5] if dtype.kind == "f" else odd)
        yield rng.choice(entries, (rows, keys)).astype(dtype), False


def all_masks(tensor: gs.Variable, keys: int) -> NDArray[Any]:
    """Return every 0/1 mask of `keys` keys, one a row."""
    rows = list(itertools.product((0, 1), repeat=keys))
    return np.array(rows, np.dtype(tensor.dtype))
