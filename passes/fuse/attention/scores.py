"""From a Softmax back to the product of queries and keys: scale, softcap and masks, in their order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.ir.shapes import SymbolicValues
from onnxslim_llm.ir.weights import dtypes
from onnxslim_llm.passes.fuse.attention.axes import View, leaves, move, scaling
from onnxslim_llm.passes.fuse.attention.products import NotAttentionError, Product, read_product
from onnxslim_llm.rewrite.constants import constant_value
from onnxslim_llm.rewrite.schema import normal_domain

__all__ = ["Mask", "Scores", "is_widening", "keeps_rows", "producer", "read_scores"]

#: Nodes between the product and the Softmax; real ones have up to ten.
MOST_STEPS = 64

#: exp(-1e4) is 0 in float32, whatever the scores beside it are: below, it does not matter how far.
MASKED = -1e4

_REGROUPING = frozenset(["Flatten", "Reshape", "Squeeze", "Unsqueeze"])
_NARROW = frozenset([TensorProto.FLOAT16, TensorProto.BFLOAT16])

MaskKind = Literal["add", "keep", "drop", "floor", "scale"]


@dataclass(frozen=True)
class Mask:
    """A step that makes scores of keys that must not be seen small.

    Attributes:
        kind: add: scores + operand. keep: Where(operand, scores, value). drop: Where(operand, value, scores).
            floor: Max(scores, value). scale: scores * value, after something was added.
        operand: What is added, or the condition; None for floor and scale.
        value: The constant.
        view: Axes of the scores there.
    """

    kind: MaskKind
    operand: gs.Tensor | None
    value: float
    view: View


@dataclass
class Scores:
    """How the input of a Softmax comes from a product.

    Attributes:
        product: Queries times keys.
        view: Axes of the Softmax's input in atoms of `product_view`, the axes (batch..., query, key) of the product.
        factor: Of the product.
        softcap: Bound of the scores, 0 for none.
        masks: In the order of their computation.
        nodes: All nodes on the way, the product first.
    """

    product: Product
    product_view: View
    view: View
    factor: float = 1.0
    softcap: float = 0.0
    masks: list[Mask] = field(default_factory=list)
    nodes: list[gs.Node] = field(default_factory=list)


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """Return the node of the standard domain that makes `tensor` as its first output, or None."""
    if not isinstance(tensor, gs.Variable) or len(tensor.inputs) != 1:
        return None
    node = tensor.inputs[0]
    return node if normal_domain(node.domain) == "" and node.outputs[0] is tensor else None


def is_widening(node: gs.Node) -> bool:
    """Return whether `node` casts 16-bit floats to float32."""
    source, target = node.inputs[0].dtype, node.outputs[0].dtype
    known = node.op == "Cast" and source is not None and target is not None
    return known and dtypes.onnx_dtype(source) in _NARROW and dtypes.onnx_dtype(target) == TensorProto.FLOAT


def keeps_rows(before: View, after: View) -> bool:
    """Return whether (batch..., row, column) is at most regrouped in its batch axes."""
    flat = [[atom for axis in view for atom in leaves(axis)] for view in (before, after)]
    ends = [[leaves(axis) for axis in view[-2:]] for view in (before, after)]
    return flat[0] == flat[1] and ends[0] == ends[1]


def read_scores(tensor: gs.Tensor, values: SymbolicValues) -> Scores:
    """Return how `tensor` comes from a product.

    Raises:
        NotAttentionError: There is a step that an attention does not have, or one at the wrong place.
    """
    return _Reader(values).read(tensor, 0)


class _Reader:
    def __init__(self, values: SymbolicValues) -> None:
        self._values = values
        self._depth = 0  # of the last failure
        self._failed: dict[int, tuple[int, NotAttentionError]] = {}

    def read(self, tensor: gs.Tensor, depth: int) -> Scores:
        """Read on, unless that failed before: sums of sums are not searched again and again."""
        if id(tensor) in self._failed:
            self._depth, error = self._failed[id(tensor)]
            raise error
        if depth > MOST_STEPS:
            raise NotAttentionError("no product is found near the Softmax", tensor)
        try:
            return self._read(tensor, depth)
        except NotAttentionError as error:
            self._failed[id(tensor)] = (self._depth, error)
            raise

    def _read(self, tensor: gs.Tensor, depth: int) -> Scores:
        self._depth = depth
        node = producer(tensor)
        if node is None:
            raise NotAttentionError("the scores do not come from a product of queries and keys", tensor)
        if node.op in ("MatMul", "Einsum"):
            return self._start(node)
        if node.op == "Identity" or node.op in _REGROUPING:
            scores = self.read(node.inputs[0], depth + 1)
            self._regroup(scores, node)
        elif node.op in ("Mul", "Div"):
            scores = self._scale(node, depth)
        elif node.op == "Add":
            scores = self._add(node, depth)
        elif node.op == "Where":
            scores = self._where(node, depth)
        elif node.op == "Max":
            scores = self._floor(node, depth)
        elif node.op == "Cast":
            raise NotAttentionError("the scores change their type on the way to the Softmax", node)
        else:
            raise NotAttentionError(f"{node.op} is no step of an attention", node)
        scores.nodes.append(node)
        return scores

    def _start(self, node: gs.Node) -> Scores:
        product = read_product(node, self._values)
        view = product.out_view(self._values)
        if view is None:
            raise NotAttentionError("the shape of the scores is not known", node)
        return Scores(product, view, product.written(view), nodes=[node])

    def _regroup(self, scores: Scores, node: gs.Node) -> None:
        view = move(node, scores.view, self._values)
        if view is None:
            raise NotAttentionError("the axes of the scores cannot be followed", node)
        scores.view = view

    def _scale(self, node: gs.Node, depth: int) -> Scores:
        scaled = scaling(node)
        if scaled is None:
            raise NotAttentionError("the scores are scaled by something else than one number", node)
        _, source, factor = scaled
        bent = producer(source)
        if bent is not None and bent.op == "Tanh":
            scores = self.read(bent.inputs[0], depth + 2)
            if scores.masks or scores.softcap:
                raise NotAttentionError("a softcap follows a mask or another softcap", node)
            if factor < 0:
                raise NotAttentionError("the softcap is negative", node)
            scores.nodes.append(bent)
            scores.softcap = factor
            scores.factor *= factor  # softcap * tanh(x / softcap): the division is part of the concept
            return scores
        scores = self.read(source, depth + 1)
        if scores.softcap or any(mask.kind not in ("add", "scale") for mask in scores.masks):
            raise NotAttentionError("the scores are scaled after a softcap, or after some were replaced", node)
        scores.factor *= factor
        if scores.masks:  # (scores + mask) * factor = scores * factor + mask * factor
            scores.masks.append(Mask("scale", None, factor, scores.view))
        return scores

    def _add(self, node: gs.Node, depth: int) -> Scores:
        failures: list[tuple[int, NotAttentionError]] = []
        for place in (0, 1):
            try:
                scores = self.read(node.inputs[place], depth + 1)
            except NotAttentionError as error:
                failures.append((self._depth, error))
                continue
            scores.masks.append(Mask("add", node.inputs[1 - place], 0.0, scores.view))
            self._check_size(scores, node)
            return scores
        raise max(failures, key=lambda failure: failure[0])[1]

    def _where(self, node: gs.Node, depth: int) -> Scores:
        condition, yes, no = node.inputs
        for kind, source, other in (("keep", yes, no), ("drop", no, yes)):
            value = constant_value(other, limit=1)
            if value is None:
                continue
            scores = self.read(source, depth + 1)
            number = float(value.reshape(-1)[0])
            narrow = value.dtype.kind != "f" or value.dtype.itemsize < 4
            if not number <= MASKED or (narrow and number != -np.inf):
                raise NotAttentionError(f"scores are replaced by {number:g}, which may still weigh", node)
            scores.masks.append(Mask("keep" if kind == "keep" else "drop", condition, number, scores.view))
            self._check_size(scores, node)
            return scores
        raise NotAttentionError("neither branch is a number", node)

    def _floor(self, node: gs.Node, depth: int) -> Scores:
        for place in (0, 1) if len(node.inputs) == 2 else ():
            value = constant_value(node.inputs[place], limit=1)
            if value is None:
                continue
            number = float(value.reshape(-1)[0])
            if value.dtype.kind != "f" or number != float(np.finfo(value.dtype).min):
                raise NotAttentionError("the scores are bounded from below", node)
            scores = self.read(node.inputs[1 - place], depth + 1)
            if scores.masks:  # before a mask, no score is as low as that
                scores.masks.append(Mask("floor", None, number, scores.view))
            return scores
        raise NotAttentionError("Max is no step of an attention", node)

    def _check_size(self, scores: Scores, node: gs.Node) -> None:
        """A mask must not broadcast the scores; whether one of unknown size does, the runtime finds out."""
        shape = self._values.shape_of(node.outputs[0])
        if shape is None or len(shape) != len(scores.view):
            raise NotAttentionError("the shape of the masked scores is not known", node)
        if any(isinstance(dim, int) and dim != 1 and not axis for dim, axis in zip(shape, scores.view, strict=True)):
            raise NotAttentionError("a mask broadcasts the scores", node)
