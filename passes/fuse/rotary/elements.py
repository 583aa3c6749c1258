"""Where the elements of a tensor come from, however they were moved.

Walking back over Slice, Split, Concat, Gather, Reshape, Unsqueeze, Transpose, Tile and the like, and keeping track of
signs, every spelling of "the second half, negated, before the first half" gives the same sources.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_graphsurgeon as gs

from onnxslim_llm.ir.shapes import SymbolicValues
from onnxslim_llm.passes.fuse.rotary.steps import STEPS, Element, Picks, Sizes, producer

__all__ = ["Elements"]

#: Steps on a way back; exports have up to ten.
MAX_STEPS = 64


class Elements(Sizes):
    """Follows elements through one model, as it is now.

    Args:
        values: Shapes and small integer contents of the model.
    """

    def __init__(self, values: SymbolicValues) -> None:
        super().__init__(values)
        self._steps: dict[tuple[int, Picks], Element | None] = {}
        self._alive: list[gs.Tensor] = []  # tensors whose ids are keys

    def step(self, element: Element) -> Element | None:
        """Return where the element comes from, one operator back; None if that operator computes something."""
        key = (id(element.tensor), element.picks)
        if key not in self._steps:
            self._alive.append(element.tensor)
            self._steps[key] = self._back(element.tensor, element.picks)
        found = self._steps[key]
        return None if found is None else Element(element.sign * found.sign, found.tensor, found.picks)

    def way(self, element: Element, stop: Iterable[int] = ()) -> list[Element]:
        """Return the element and all it comes from, nearest first; it ends at tensors whose `id` is in `stop`."""
        way = [element]
        while len(way) < MAX_STEPS and id(element.tensor) not in stop:
            before = self.step(element)
            if before is None:
                break
            way.append(before)
            element = before
        return way

    def origin(self, element: Element, stop: Iterable[int] = ()) -> Element:
        """Return the end of the element's way."""
        return self.way(element, stop)[-1]

    def _back(self, tensor: gs.Tensor, picks: Picks) -> Element | None:
        node = producer(tensor)
        shape = self.shape(tensor)
        rule = None if node is None else STEPS.get(node.op)
        if node is None or rule is None or shape is None or not node.inputs or self.shape(node.inputs[0]) is None:
            return None
        try:
            return rule(self, node, tensor, picks)
        except (ArithmeticError, IndexError, TypeError, ValueError):
            return None  # axes or bounds that do not fit: the node cannot run
