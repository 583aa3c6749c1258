"""Masks of attention as biases of moderate size, merged and shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.rewrite.constants import constant_value
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.schema import normal_domain

__all__ = ["HIDES", "LegalBiases", "hides", "producer_of"]

#: Biases below this hide a key: scores are at most some hundreds, and e^-1000 is no float32 number.
HIDES = -1e3
#: Operators that hand on the elements of a mask.
_CARRIERS = frozenset(["Expand", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"])


def producer_of(tensor: gs.Tensor) -> gs.Node | None:
    """Return the node of ai.onnx that makes a tensor, or None."""
    if not isinstance(tensor, gs.Variable) or len(tensor.inputs) != 1:
        return None
    node = tensor.inputs[0]
    return node if normal_domain(node.domain) == "" else None


class LegalBiases:
    """Makes biases between `lowest` and 0 of masks, each once.

    Args:
        op: Collects the nodes.
        lowest: The bias of what is hidden.
        dtype: Element type of the scores.
    """

    def __init__(self, op: Builder, lowest: float, dtype: np.dtype[Any]) -> None:
        self._op = op
        self._lowest = lowest
        self._dtype = dtype
        self._made: dict[Any, gs.Tensor | None] = {}

    def of_mask(self, mask: gs.Tensor) -> gs.Tensor | None:
        """Return the legal form of an additive mask; None if the tensor is none (nothing in it hides)."""
        key = id(mask)
        if key not in self._made:
            self._made[key] = self._legal(mask)
        return self._made[key]

    def of_condition(self, condition: gs.Tensor, shown: bool = True) -> gs.Tensor:
        """Return 0 where `condition` is `shown`, and the lowest bias elsewhere."""
        key = (id(condition), shown)
        if key not in self._made:
            self._made[key] = self._from_condition(condition, shown)
        made = self._made[key]
        assert made is not None
        return made

    def merged(self, biases: Sequence[gs.Tensor]) -> gs.Tensor:
        """Return the bias that hides whatever one of `biases` hides."""
        unique = list({id(bias): bias for bias in biases}.values())
        if len(unique) == 1:
            return unique[0]
        key = tuple(sorted(id(bias) for bias in unique))
        if key not in self._made:
            self._made[key] = self._op.Min(*unique)
        made = self._made[key]
        assert made is not None
        return made

    def _legal(self, mask: gs.Tensor) -> gs.Tensor | None:
        value = constant_value(mask, limit=1 << 26)
        if value is not None:
            if value.dtype.kind not in "fV" or not np.any(value <= HIDES):
                return None
            return self._constant(np.where(value <= HIDES, self._lowest, value))
        node = producer_of(mask)
        if node is None:
            return None
        if node.op in _CARRIERS or node.op == "Cast":
            inner = self.of_mask(node.inputs[0])
            if inner is None:
                return None
            return inner if node.op == "Cast" else self._op.call("", node.op, inner, *node.inputs[1:], **node.attrs)
        if node.op in ("Add", "Min"):
            both = [self.of_mask(tensor) for tensor in node.inputs]
            return self.merged([b for b in both if b is not None]) if None not in both else None
        if node.op == "Where":
            return self._choice(node)
        return self._product(node) if node.op == "Mul" else None

    def _choice(self, node: gs.Node) -> gs.Tensor | None:
        """Return the form of Where (condition, a, b), one of which hides and the other of which is 0 or a mask."""
        condition, first, second = node.inputs
        for hidden, other, shown in ((second, first, True), (first, second, False)):
            if not hides(hidden):
                continue
            value = constant_value(other)
            if value is not None and not np.any(value):
                return self.of_condition(condition, shown)
            rest = self.of_mask(other)
            if rest is not None:
                return self.merged([rest, self.of_condition(condition, shown)])
        return None

    def _product(self, node: gs.Node) -> gs.Tensor | None:
        """Return the form of x * factor, for an x between 0 and 1 (or -1 and 0) that says how much is hidden."""
        for x, factor in (node.inputs, reversed(list(node.inputs))):
            value = constant_value(factor)
            if value is None or value.size != 1 or abs(float(value.reshape(-1)[0])) < -HIDES:
                continue
            if constant_value(x) is not None:
                return None
            hidden = _complement(x) if float(value.reshape(-1)[0]) < 0 else None
            if hidden is not None:
                return self.of_condition(self._is_set(hidden))
            size = np.full(value.shape, np.sign(float(value.reshape(-1)[0])) * -self._lowest)
            wide = self._op.Cast(x, to=_float_type(self._dtype)) if x.dtype != self._dtype else x
            return self._op.Mul(wide, self._constant(size))
        return None

    def _is_set(self, mask: gs.Tensor) -> gs.Tensor:
        """Return where a mask of booleans or integers is not 0."""
        if np.dtype(mask.dtype) == np.bool_:
            return mask
        key = (id(mask), "set")
        if key not in self._made:
            made = self._op.Greater(mask, np.array(0, mask.dtype))
            made.dtype = np.dtype(np.bool_)
            self._made[key] = made
        found = self._made[key]
        assert found is not None
        return found

    def _from_condition(self, condition: gs.Tensor, shown: bool) -> gs.Tensor:
        value = constant_value(condition, limit=1 << 26)
        if value is not None:
            return self._constant(np.where(value == shown, 0.0, self._lowest))
        node = producer_of(condition)
        if node is not None and node.op == "Not":
            return self.of_condition(node.inputs[0], not shown)
        if node is not None and node.op == ("And" if shown else "Or"):
            return self.merged([self.of_condition(tensor, shown) for tensor in node.inputs])
        if node is not None and node.op in _CARRIERS:
            inner = self.of_condition(node.inputs[0], shown)
            return self._op.call("", node.op, inner, *node.inputs[1:], **node.attrs)
        # Looked up, not computed: so the range of the bias is that of a table, whatever the data hide.
        table = self._constant(np.array([self._lowest, 0.0] if shown else [0.0, self._lowest]))
        return self._op.Gather(table, self._op.Cast(condition, to=TensorProto.INT32), axis=0)

    def _constant(self, value: Any) -> gs.Tensor:
        return self._op.constant(np.asarray(value).astype(self._dtype), "mask/bias")


def _complement(tensor: gs.Tensor) -> gs.Tensor | None:
    """Return the integers or booleans m of a tensor 1 - m, seen through Cast; None if it is none."""
    node = producer_of(tensor)
    if node is None or node.op != "Sub":
        return None
    one = constant_value(node.inputs[0])
    inner = node.inputs[1]
    while one is not None and np.all(one == 1):
        maker = producer_of(inner)
        if inner.dtype is not None and np.dtype(inner.dtype).kind in "iub":
            return inner
        if maker is None or maker.op != "Cast":
            return None
        inner = maker.inputs[0]
    return None


def hides(tensor: gs.Tensor) -> bool:
    """Return whether a tensor is a constant that hides whatever it stands for."""
    value = constant_value(tensor)
    return value is not None and value.dtype.kind in "fV" and bool(np.all(value <= HIDES))


def _float_type(dtype: np.dtype[Any]) -> int:
    from onnxslim_llm.ir.weights import dtypes

    return int(dtypes.onnx_dtype(dtype))
