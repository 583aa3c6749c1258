"""Reading the elements of a tensor as sums of two products."""

from __future__ import annotations

from typing import NamedTuple

import onnx_graphsurgeon as gs

from onnxslim_llm.passes.fuse.rotary.elements import Elements
from onnxslim_llm.passes.fuse.rotary.steps import Element, operand_picks, producer
from onnxslim_llm.rewrite.constants import is_constant

__all__ = ["Product", "SumReader"]

_SUMS = frozenset(["Add", "Sub", "Sum"])
_TERMS = 2


class Product(NamedTuple):
    """`sign` times `left` times `right`."""

    sign: int
    left: Element
    right: Element


class SumReader:
    """Reads the last axis of a tensor.

    Args:
        elements: Of the model.
        output: The tensor.
        rank: Its axes.

    Attributes:
        inner: Nodes between the products and the tensor, both included, that were met so far.
    """

    def __init__(self, elements: Elements, output: gs.Variable, rank: int) -> None:
        self.elements = elements
        self.output = output
        self.rank = rank
        self.inner: dict[int, gs.Node] = {}

    def element(self, index: int, stop: frozenset[int]) -> Element:
        """Return where an element comes from: the tensors in `stop`, by `id`, end the way."""
        return self._way(index, stop)[-1]

    def _way(self, index: int, stop: frozenset[int]) -> list[Element]:
        return self.elements.way(Element(1, self.output, ((self.rank - 1, index),)), stop)

    def products(self, index: int, stop: frozenset[int]) -> list[Product] | None:
        """Return the two products that an element of the result is the sum of, or None."""
        way_to_sum = self._way(index, stop)
        total = way_to_sum[-1]
        node = producer(total.tensor)
        if node is None or node.op not in _SUMS or len(node.inputs) != _TERMS or id(total.tensor) in stop:
            return None
        found = []
        for position, tensor in enumerate(node.inputs):
            sign = -1 if node.op == "Sub" and position else 1
            term = self._operand(total, tensor)
            way = [] if term is None else self.elements.way(term, stop)
            end = way[-1] if way else None
            product = producer(end.tensor) if end is not None and id(end.tensor) not in stop else None
            if end is None or product is None or product.op != "Mul" or any(map(_is_number, product.inputs)):
                return None
            left, right = (self._operand(end, factor) for factor in product.inputs)
            if left is None or right is None:
                return None
            for passed in way:
                self._remember(passed.tensor)
            found.append(Product(total.sign * end.sign * sign, left._replace(sign=1), right._replace(sign=1)))
        for passed in way_to_sum:
            self._remember(passed.tensor)
        return found

    def _operand(self, result: Element, tensor: gs.Tensor) -> Element | None:
        shape, whole = self.elements.shape(tensor), self.elements.shape(result.tensor)
        if shape is None or whole is None:
            return None
        return Element(1, tensor, operand_picks(result.picks, shape, len(whole)))

    def _remember(self, tensor: gs.Tensor) -> None:
        node = producer(tensor)
        if node is not None:
            self.inner[id(node)] = node


def _is_number(tensor: gs.Tensor) -> bool:
    """Return whether a factor is one number for all elements."""
    return is_constant(tensor) and all(dim == 1 for dim in tensor.shape or ())
