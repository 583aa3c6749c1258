"""What a model computes from sizes and masks alone, for the tokens so far and for the new ones among them.

In a model without a cache, positions, rotary tables and masks are made for the whole text. With a cache a run gets the
last tokens of the text only, and the rest of its length from the cache. So these tensors are computed for the whole
text, as before, and cut where they meet the new tokens. The cut is moved towards the sources as far as it goes, so that
as a rule nothing is computed that is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.ir.shapes import SymbolicValues
from onnxslim_llm.ir.shapes.dims import Dim, Expr
from onnxslim_llm.passes.fuse.tokens.axes import ELEMENTWISE, MixesTokensError
from onnxslim_llm.rewrite.constants import constant_value
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.schema import normal_domain

__all__ = ["Lengths", "WholeText", "depends_on"]

_END = np.iinfo(np.int64).max


def depends_on(dim: Dim, length: Expr) -> bool:
    """Return whether a size changes with the number of tokens."""
    names = {name for monomial, _ in length.terms for name in monomial}
    return isinstance(dim, Expr) and any(names & set(monomial) for monomial, _ in dim.terms)


class Lengths:
    """Numbers of tokens as tensors of the graph, made on first use.

    Args:
        op: Makes nodes.
        past: A cache input [B, H, P, D].
        ids: Token ids [B, S].
        mask: Mask of the whole text [B, P + S], if there is one.
    """

    def __init__(self, op: Builder, past: gs.Tensor, ids: gs.Tensor, mask: gs.Tensor | None) -> None:
        self._op, self._past, self._ids, self._mask = op, past, ids, mask
        self._made: dict[str, gs.Tensor] = {}

    def _once(self, name: str, make: Callable[[], gs.Tensor]) -> gs.Tensor:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    @property
    def before(self) -> gs.Tensor:
        """P as int64 [1]."""
        return self._once("before", lambda: self._op.Shape(self._past, start=2, end=3))

    @property
    def total(self) -> gs.Tensor:
        """P + S as int64 [1]."""
        if self._mask is not None:
            mask = self._mask
            return self._once("total", lambda: self._op.Shape(mask, start=1, end=2))
        return self._once("total", lambda: self._op.Add(self.before, self._op.Shape(self._ids, start=1, end=2)))

    def scalar(self, which: str) -> gs.Tensor:
        """Return `before` or `total` without its axis."""
        return self._once(f"{which} scalar", lambda: self._op.Squeeze(getattr(self, which), np.array([0], np.int64)))


class WholeText:
    """Rebuilds tensors that do not depend on the text itself.

    Args:
        op: Makes nodes.
        values: Shapes in the model as it was.
        length: S in the model as it was.
        lengths: P and P + S.
        mask: The input that covers the whole text, if there is one.
        is_text: Whether a tensor depends on the text.
    """

    def __init__(
        self,
        op: Builder,
        values: SymbolicValues,
        length: Expr,
        lengths: Lengths,
        mask: gs.Tensor | None,
        is_text: Callable[[gs.Tensor], bool],
    ) -> None:
        self._op, self._values, self._length, self._lengths = op, values, length, lengths
        self._mask, self._is_text = mask, is_text
        self._whole: dict[int, gs.Tensor] = {}
        self._new: dict[tuple[int, int], gs.Tensor] = {}
        self._static: dict[int, bool] = {}

    def is_static(self, tensor: gs.Tensor) -> bool:
        """Return whether a tensor depends on neither sizes nor masks: it is the same in all runs."""
        if id(tensor) not in self._static:
            if not isinstance(tensor, gs.Variable):
                static = True
            elif not tensor.inputs or tensor is self._mask:
                static = tensor.is_empty()
            else:
                node = tensor.inputs[0]
                static = node.op not in ("Shape", "Size") and all(self.is_static(t) for t in node.inputs)
            self._static[id(tensor)] = static
        return self._static[id(tensor)]

    def whole(self, tensor: gs.Tensor) -> gs.Tensor:
        """Return `tensor` as it was for a text of P + S tokens."""
        if self.is_static(tensor) or tensor is self._mask:
            return tensor
        if id(tensor) not in self._whole:
            self._rebuild(tensor.inputs[0])
        return self._whole[id(tensor)]

    def _rebuild(self, node: gs.Node) -> None:
        if node.op == "Size":
            raise MixesTokensError("a number of elements is used as a number", node)
        source = node.inputs[0] if node.inputs else None
        if node.op == "Shape" and source is not None and self._is_text(source):
            self._whole[id(node.outputs[0])] = self._sizes(node, source)
            return
        inputs = [self.whole(tensor) for tensor in node.inputs]
        made = self._op.call(node.domain or "", node.op, *inputs, _outputs=len(node.outputs), **node.attrs)
        for old, new in zip(node.outputs, made if isinstance(made, tuple) else (made,), strict=True):
            self._whole[id(old)] = new

    def _sizes(self, node: gs.Node, source: gs.Tensor) -> gs.Tensor:
        """Return the shape that a tensor of the text had for the whole text."""
        shape = self._values.shape_of(source)
        if shape is None:
            raise MixesTokensError(f"the shape of '{source.name}' is not known", node)
        start, end, _ = slice(node.attrs.get("start"), node.attrs.get("end")).indices(len(shape))
        parts: list[gs.Tensor | np.ndarray] = []
        for axis in range(start, end):
            dim = shape[axis]
            if dim == self._length:
                parts.append(self._lengths.total)
            elif depends_on(dim, self._length):
                raise MixesTokensError(f"a size of {dim} is used for more than a Reshape", node)
            elif isinstance(dim, int):
                parts.append(np.array([dim], np.int64))
            else:
                parts.append(self._op.Shape(source, start=axis, end=axis + 1))
        if not parts:
            return self._op.constant(np.zeros(0, np.int64))
        joined: gs.Tensor = self._op.Concat(*parts, axis=0)
        return joined

    def new(self, tensor: gs.Tensor, axis: int) -> gs.Tensor:
        """Return `tensor`, for the whole text along all axes but `axis`, and there for its new tokens only.

        Args:
            tensor: A tensor of the model as it was.
            axis: 0 or larger; its size is that of the text.
        """
        key = (id(tensor), axis)
        if key not in self._new:
            cut = self._cut(tensor, axis) if isinstance(tensor, gs.Variable) and tensor.inputs else None
            self._new[key] = self._slice(self.whole(tensor), axis) if cut is None else cut
        return self._new[key]

    def _slice(self, tensor: gs.Tensor, axis: int) -> gs.Tensor:
        ends, axes = np.array([_END], np.int64), np.array([axis], np.int64)
        sliced: gs.Tensor = self._op.Slice(tensor, self._lengths.before, ends, axes)
        return sliced

    def _runs(self, tensor: gs.Tensor, axis: int) -> bool:
        shape = self._values.shape_of(tensor)
        return shape is not None and 0 <= axis < len(shape) and shape[axis] == self._length

    def _cut(self, tensor: gs.Tensor, axis: int) -> gs.Tensor | None:
        """Return the cut of the producer's inputs carried through the producer, or None if it has to cut itself."""
        node = tensor.inputs[0]
        shape = self._values.shape_of(tensor)
        if normal_domain(node.domain) != "" or len(node.outputs) != 1 or shape is None:
            return None
        if node.op == "Range":
            return self._range(node)
        if node.op in ELEMENTWISE:
            return self._elementwise(node, len(shape), axis)
        if node.op == "Transpose":
            perm = list(node.attrs.get("perm", range(len(shape) - 1, -1, -1)))
            return self._again(node, {0: perm[axis]})
        if node.op == "Unsqueeze":
            axes = constant_value(node.inputs[1])
            if axes is None:
                return None
            added = {int(a) % len(shape) for a in axes.reshape(-1)}
            return self._again(node, {0: axis - sum(a < axis for a in added)})
        if node.op == "Gather":
            table = self._values.shape_of(node.inputs[0])
            start = int(node.attrs.get("axis", 0)) % len(table) if table else 0
            return self._again(node, {1: axis - start}) if table else None
        if node.op == "MatMul" and len(shape) >= 2 and axis >= len(shape) - 2:
            index = 0 if axis == len(shape) - 2 else 1
            operand = self._values.shape_of(node.inputs[index])
            offset = len(shape) - len(operand) if operand else 0
            return self._again(node, {index: axis - offset}) if operand and len(operand) >= 2 else None
        return None

    def _range(self, node: gs.Node) -> gs.Tensor | None:
        start, step = constant_value(node.inputs[0]), constant_value(node.inputs[2])
        if start is None or step is None or start != 0 or step != 1 or start.dtype != np.int64:
            return None
        made: gs.Tensor = self._op.Range(
            self._lengths.scalar("before"), self._lengths.scalar("total"), np.array(1, np.int64)
        )
        return made

    def _elementwise(self, node: gs.Node, rank: int, axis: int) -> gs.Tensor | None:
        cuts = {}
        for index, tensor in enumerate(node.inputs):
            shape = self._values.shape_of(tensor)
            if shape is None:
                return None
            own = axis - (rank - len(shape))
            if own >= 0 and shape[own] != 1:
                cuts[index] = own
        return self._again(node, cuts)

    def _again(self, node: gs.Node, cuts: dict[int, int]) -> gs.Tensor | None:
        """Return the node's operation on inputs that are cut along the given axes; the others are whole."""
        if not all(self._runs(node.inputs[index], axis) for index, axis in cuts.items()):
            return None
        inputs = [
            self.new(tensor, cuts[index]) if index in cuts else self.whole(tensor)
            for index, tensor in enumerate(node.inputs)
        ]
        made: gs.Tensor = self._op.call("", node.op, *inputs, **node.attrs)
        return made
