"""Operands that broadcast, made as large as operators without broadcasting want them, once for all of their readers."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.ir.shapes import shape_of
from onnxslim_llm.rewrite.edit import Builder

__all__ = ["SharedExpand"]


class SharedExpand:
    """Makes Expand nodes and remembers them.

    A tensor that it returns stands before the first call that asked for it: calls are lowered in graph order.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[gs.Tensor, gs.Tensor]] = {}

    def along(
        self, op: Builder, graph: gs.Graph, tensor: gs.Tensor, axis: int, like: gs.Tensor, like_axis: int
    ) -> gs.Tensor:
        """Return `tensor` with `axis` as long as `like_axis` of `like`; itself if it surely is.

        Args:
            op: Where the nodes go.
            graph: The graph that they will be in.
            tensor: A tensor of known rank.
            axis: Its axis of that length, or of length 1.
            like: Another tensor of known rank.
            like_axis: The axis there.
        """
        mine, theirs = shape_of(tensor), shape_of(like)
        assert mine is not None
        assert theirs is not None
        size = theirs[like_axis]
        if size not in (None, "") and mine[axis] == size:
            return tensor
        key = (id(graph), id(tensor), axis, size or id(like))
        if key not in self._made:
            ones = np.ones(len(mine) - 1, np.int64)
            dim = op.Shape(like, start=like_axis, end=like_axis + 1)
            parts = [part for part in (ones[:axis], dim, ones[axis:]) if part is dim or len(part)]
            expanded = op.Expand(tensor, op.Concat(*parts, axis=0) if len(parts) > 1 else dim)
            self._made[key] = (expanded, tensor)
        return self._made[key][0]
