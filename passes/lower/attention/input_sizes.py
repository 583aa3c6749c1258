"""Sizes as tensors, read off the graph's inputs, so that all layers share the nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.ir.shapes import SymbolicValues
from onnxslim_llm.ir.shapes.dims import Dim, Expr, symbol
from onnxslim_llm.rewrite.edit import Builder

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["InputSizes"]


class InputSizes:
    """Makes int64 tensors [1] that hold sizes.

    Args:
        model: The model.
        values: Its symbolic shapes, as it is now.

    Attributes:
        nodes: Nodes that were made; they read nothing but graph inputs, so that they may stand first.
        hidden: Identities of inputs that are not read: their sizes are about to change.
    """

    def __init__(self, model: Model, values: SymbolicValues) -> None:
        self._model = model
        self._values = values
        self._made: dict[Dim, gs.Tensor] = {}
        self._op = Builder(model, "sizes")
        self.hidden: set[int] = set()

    @property
    def nodes(self) -> list[gs.Node]:
        """The nodes, in order."""
        return self._op.nodes

    def of(self, dim: Dim | None) -> gs.Tensor | None:
        """Return a tensor [1] with a size, or None if the inputs do not have it, nor the parts that it is a sum of."""
        if dim is None or dim in self._made:
            return None if dim is None else self._made[dim]
        if isinstance(dim, int):
            self._made[dim] = self._op.constant(np.array([dim], np.int64))
            return self._made[dim]
        for tensor in self._model.graph.inputs:
            shape = None if id(tensor) in self.hidden else self._values.shape_of(tensor)
            for axis, size in enumerate(shape or ()):
                if size == dim:
                    self._made[dim] = self.read(self._op, tensor, axis)
                    return self._made[dim]
        return self._sum(dim)

    def _sum(self, dim: Expr) -> gs.Tensor | None:
        if len(dim.terms) < 2:
            return None
        parts = [self.of(symbol(names[0])) for names, factor in dim.terms if len(names) == 1 and factor == 1]
        parts += [self.of(factor) for names, factor in dim.terms if not names]
        known = [part for part in parts if part is not None]
        if len(known) != len(dim.terms):
            return None
        total = known[0]
        for part in known[1:]:
            total = self._op.Add(total, part)
            total.dtype, total.shape = np.dtype(np.int64), [1]
        self._made[dim] = total
        return total

    def difference(self, a: gs.Tensor | None, b: gs.Tensor | None) -> gs.Tensor | None:
        """Return a - b, [1]; None if one of them is not known."""
        if a is None or b is None:
            return None
        made: gs.Variable = self._op.Sub(a, b)
        made.dtype, made.shape = np.dtype(np.int64), [1]
        return made

    def concatenated(self, parts: list[gs.Tensor]) -> gs.Tensor:
        """Return several sizes as one tensor."""
        made: gs.Variable = self._op.Concat(*parts, axis=0)
        made.dtype, made.shape = np.dtype(np.int64), [len(parts)]
        return made

    @staticmethod
    def read(op: Builder, tensor: gs.Tensor, axis: int) -> gs.Variable:
        """Return the size of an axis of any tensor, [1]."""
        size: gs.Variable = op.Shape(tensor, start=axis, end=axis + 1)
        size.dtype, size.shape = np.dtype(np.int64), [1]
        return size
