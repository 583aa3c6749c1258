"""Recognising a rotation of pairs, whatever operators spell it.

A candidate is read element by element: each element of the last axis of the result must be a sum of two products
x_i * c + x_j * s of elements of one tensor X with columns of two tables, or an element of X itself. Signs and indices
then say whether it is a rotation, of which pairs, and which way round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.rotary import RotaryPairs
from onnxslim_llm.passes.fuse.rotary.elements import Elements
from onnxslim_llm.passes.fuse.rotary.products import Product, SumReader
from onnxslim_llm.passes.fuse.rotary.steps import Element, producer
from onnxslim_llm.rewrite.rule import Refusal

__all__ = ["ROOTS", "Column", "NearRotation", "Rotation", "find_rotation"]

#: What the last operator of a rotation can be.
ROOTS = frozenset(["Add", "Sub", "Sum", "Concat", "Reshape"])
#: Largest head; a hidden state as a whole is no head.
MAX_WIDTH = 1024
#: Nodes that are looked at behind a factor to find angles.
_NODES_SEEN = 64


class Column(NamedTuple):
    """A column of a table, without its sign.

    Attributes:
        operand: What is multiplied with.
        origin: Where that comes from, without its sign.
        negated: The operand is minus its origin.
    """

    operand: Element
    origin: Element
    negated: bool


@dataclass(frozen=True)
class Rotation:
    """A rotation that was recognised.

    Attributes:
        output: The result; its last axis has the elements of a head.
        x: What is rotated; its last `trailing` axes have the elements of a head, maybe among others.
        trailing: 1, or 2 where pairs have an axis of their own.
        offset: First element of the head in x.
        width: Elements of a head, D.
        pairs: How elements are paired.
        cosines: A column for each pair, R / 2.
        sines: Likewise.
        partners: For each pair the columns of its other element, that must be the same numbers: (cosine, sine).
        inner: Nodes that do the arithmetic.
    """

    output: gs.Variable
    x: gs.Tensor
    trailing: int
    offset: int
    width: int
    pairs: RotaryPairs
    cosines: list[Column]
    sines: list[Column]
    partners: list[tuple[Column, Column]]
    inner: list[gs.Node]


class NearRotation(NamedTuple):
    """What looks like a rotation and is none.

    Attributes:
        refusal: Why.
        inner: `id`s of the nodes that do its arithmetic.
    """

    refusal: Refusal
    inner: frozenset[int]


class _Row(NamedTuple):
    """An element of the result: x[own] * cosine + sign * x[other] * sine."""

    own: int
    other: int
    own_sign: int
    other_sign: int
    cosine: Column
    sine: Column


def find_rotation(elements: Elements, root: gs.Node) -> Rotation | NearRotation | None:
    """Return the rotation whose result `root` makes, why it is none although it looks like one, or None."""
    output = root.outputs[0]
    shape, width = elements.shape(output), elements.size(output, -1)
    if shape is None or width is None or not 1 < width <= MAX_WIDTH:
        return None
    search = _Search(elements, output, len(shape), width)
    first = search.products(0, frozenset())
    if first is None:
        return None
    nearest: NearRotation | None = None
    for x in search.rotated(first):
        found = search.try_rotating(x)
        if isinstance(found, Rotation):
            return found
        if nearest is None and found is not None:
            nearest = NearRotation(found, frozenset(search.inner))
    return nearest


class _Search(SumReader):
    def __init__(self, elements: Elements, output: gs.Variable, rank: int, width: int) -> None:
        super().__init__(elements, output, rank)
        self.width = width

    def rotated(self, products: Sequence[Product]) -> Iterator[gs.Tensor]:
        """Yield the tensors that may be X: those that both products use, of the right width first, farthest first."""
        seen: list[dict[int, Element]] = []
        for product in products:
            ways = [*self.elements.way(product.left), *self.elements.way(product.right)]
            seen.append({id(element.tensor): element for element in ways})
        both = [element for key, element in reversed(seen[0].items()) if key in seen[1]]
        # A product of complex numbers could be read either way: what is made of angles is no head.
        ranked = sorted(both, key=lambda e: (_is_made_of_angles(e.tensor), self._width(e) != self.width))
        yield from (element.tensor for element in ranked if self._has_all_columns(element))

    def _has_all_columns(self, element: Element) -> bool:
        """Return whether the element is not repeated along an axis of the result."""
        shape, whole = self.elements.shape(element.tensor), self.elements.shape(self.output)
        fixed = {axis for axis, _ in element.picks}
        free = [dim for axis, dim in enumerate(shape or ()) if axis not in fixed]
        return whole is not None and all(a == b or a != 1 for a, b in zip(free, whole[:-1], strict=False))

    def _width(self, element: Element) -> int | None:
        sizes = [self.elements.size(element.tensor, axis) for axis, _ in element.picks]
        total = 1
        for size in sizes:
            if size is None:
                return None
            total *= size
        return total

    def try_rotating(self, x: gs.Tensor) -> Rotation | Refusal | None:
        """Read every element with `x` as what is rotated."""
        self.inner.clear()
        stop = frozenset([id(x)])
        where = self.output.name
        rows: list[_Row] = []
        passed: list[tuple[int, int]] = []
        for index in range(self.width):
            row = self._row(index, x, stop, rows[0].own if rows else None) if not passed else None
            if row is not None:
                if row.own == row.other:
                    return None  # a sum of products, but of one element
                rows.append(row)
                continue
            end = self.element(index, stop)
            place = self._place(end, x) if end.sign == 1 else None
            if place is None:
                return Refusal(f"element {index} is neither rotated nor passed on", where) if rows else None
            passed.append((index, place))
        trailing = self._trailing(x)
        if not rows or not trailing:
            return None
        offset = rows[0].own
        if any(place - index != offset for index, place in passed):
            return Refusal("the elements that are not rotated are moved", where)
        return self._rotation(x, trailing, offset, rows)

    def _rotation(self, x: gs.Tensor, trailing: int, offset: int, rows: list[_Row]) -> Rotation | Refusal:
        where, size, half = self.output.name, len(rows), len(rows) // 2
        pairs: RotaryPairs
        others = [row.other - offset for row in rows]
        if any(row.own - offset != index for index, row in enumerate(rows)):
            return Refusal("an element's product with its cosine lands elsewhere", where)
        if size % 2 == 0 and others == [(index + half) % size for index in range(size)]:
            pairs = "half"
            firsts = [(index, index + half) for index in range(half)]
        elif size % 2 == 0 and others == [index ^ 1 for index in range(size)]:
            pairs = "interleaved"
            firsts = [(2 * index, 2 * index + 1) for index in range(half)]
        else:
            return Refusal("elements are paired neither by halves nor with their neighbours", where)
        for first, second in firsts:
            a, b = rows[first], rows[second]
            if (a.own_sign, b.own_sign) != (1, 1):
                return Refusal("a cosine is negated", where)
            if (a.other_sign, b.other_sign) == (1, -1):
                return Refusal("it rotates backwards: the sign is on the second element of a pair", where)
            if (a.other_sign, b.other_sign) != (-1, 1):
                return Refusal("it does not rotate: both products with sines have the same sign", where)
        return Rotation(
            output=self.output,
            x=x,
            trailing=trailing,
            offset=offset,
            width=self.width,
            pairs=pairs,
            cosines=[rows[first].cosine for first, _ in firsts],
            sines=[rows[first].sine for first, _ in firsts],
            partners=[(rows[second].cosine, rows[second].sine) for _, second in firsts],
            inner=list(self.inner.values()),
        )

    def _row(self, index: int, x: gs.Tensor, stop: frozenset[int], offset: int | None) -> _Row | None:
        products = self.products(index, stop)
        if products is None:
            return None
        terms = []
        for product in products:
            term = self._term(product, x, stop)
            if term is None:
                return None
            terms.append(term)
        # The product with the cosine is the one of the element that ends up in its own place.
        (place, sign, column), (other_place, other_sign, other_column) = terms
        own = min(place, other_place) if offset is None else offset + index
        if other_place == own:
            return _Row(other_place, place, other_sign, sign, other_column, column)
        return _Row(place, other_place, sign, other_sign, column, other_column)

    def _term(self, product: Product, x: gs.Tensor, stop: frozenset[int]) -> tuple[int, int, Column] | None:
        for factor, table in ((product.left, product.right), (product.right, product.left)):
            end = self.elements.origin(factor, stop)
            place = self._place(end, x)
            if place is not None:
                origin = self.elements.origin(table)
                sign = product.sign * end.sign * origin.sign
                return place, sign, Column(table, origin._replace(sign=1), origin.sign < 0)
        return None

    def _place(self, element: Element, x: gs.Tensor) -> int | None:
        """Return the index of an element of x within its last axes."""
        shape = self.elements.shape(x)
        if element.tensor is not x or shape is None or len(shape) - len(element.picks) != self.rank - 1:
            return None
        place = 0
        for position, (axis, index) in enumerate(element.picks):
            size = shape[axis]
            if axis != self.rank - 1 + position or not isinstance(size, int):
                return None
            place = place * size + index
        return place

    def _trailing(self, x: gs.Tensor) -> int:
        shape = self.elements.shape(x)
        return 0 if shape is None else len(shape) - self.rank + 1


def _is_made_of_angles(tensor: gs.Tensor) -> bool:
    """Return whether a cosine or sine lies nearer behind the tensor than any product of matrices."""
    waiting, seen = [tensor], 0
    while waiting and seen < _NODES_SEEN:
        node, seen = producer(waiting.pop()), seen + 1
        if node is not None and node.op in ("Cos", "Sin"):
            return True
        if node is not None and node.op not in ("MatMul", "Gemm"):
            waiting += node.inputs
    return False
