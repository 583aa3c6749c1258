"""What is left of masks, as the tensors that attention operators take: [B or 1, H or 1, S, T], shared by all layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.ir.shapes import SymbolicValues
from onnxslim_llm.ir.shapes.dims import Dim
from onnxslim_llm.passes.lower.attention.attention_call import AttentionCall
from onnxslim_llm.passes.lower.attention.input_sizes import InputSizes
from onnxslim_llm.rewrite.constants import constant_value
from onnxslim_llm.rewrite.edit import Builder

__all__ = ["Masks"]

_RANK = 4  # what GroupQueryAttention and MultiHeadAttention insist on


class Masks:
    """Makes masks once for all calls of a graph that need the same.

    Args:
        values: Symbolic shapes of the model.
        sizes: Makes sizes.
    """

    def __init__(self, values: SymbolicValues, sizes: InputSizes) -> None:
        self._values = values
        self._sizes = sizes
        self._made: dict[tuple[Any, ...], gs.Tensor] = {}

    def full_bias(self, op: Builder, call: AttentionCall, *, causal: bool, window: int) -> gs.Tensor | None:
        """Return the bias of a call with S rows and T columns, or None if it has none.

        Args:
            op: Collects what cannot be shared.
            call: The call.
            causal: The operator cannot hide later keys itself, and the bias has to.
            window: Likewise keys before a window; 0 for none.
        """
        bias = call.inputs.get("bias")
        if causal or window:
            return self._once(
                op, call, ("band", causal, window, id(bias)), lambda: self._band(op, call, causal, window)
            )
        if bias is None or self._is_full(call, bias):
            return bias
        return self._once(
            op, call, ("full", id(bias)), lambda: self._expanded(op, call, bias, self._values.shape_of(bias))
        )

    def visible(self, op: Builder, call: AttentionCall) -> gs.Tensor | None:
        """Return the bias as booleans of S rows and T columns, true where a key is visible; None if it says more.

        Attention takes either, and one node less makes booleans.
        """
        seen = _seen(call.inputs["bias"]) if "bias" in call.inputs and not call.window else None
        if seen is None:
            return None
        condition, axes = seen
        return self._once(
            op, call, ("visible", id(call.inputs["bias"])), lambda: self._spread(op, call, condition, axes), np.bool_
        )

    def _spread(self, op: Builder, call: AttentionCall, condition: gs.Tensor, axes: gs.Tensor) -> gs.Tensor:
        bias = call.inputs["bias"]
        visible: gs.Variable = op.Unsqueeze(condition, axes)
        visible.dtype, visible.shape = np.dtype(bool), bias.shape
        return self._expanded(op, call, visible, self._values.shape_of(bias))

    def _once(
        self, op: Builder, call: AttentionCall, key: tuple[Any, ...], make: Callable[[], gs.Tensor], dtype: Any = None
    ) -> gs.Tensor:
        """Make a tensor, or return the one that was made for a call of the same sizes."""
        dtype = np.dtype(self._dtype(call) if dtype is None else dtype)
        key = (*key, call.queries, call.keys, call.columns, dtype)
        shared = self._sizes.of(call.queries) is not None and call.total(self._sizes) is not None
        if not shared or key not in self._made:
            tensor = make()
            tensor.dtype = dtype
            if not shared:
                return tensor
            self._made[key] = tensor
        return self._made[key]

    @staticmethod
    def _dtype(call: AttentionCall) -> Any:
        bias = call.inputs.get("bias")
        found = call.inputs["Q"].dtype if bias is None or bias.dtype is None else bias.dtype
        return np.float32 if found is None else found

    def _is_full(self, call: AttentionCall, bias: gs.Tensor) -> bool:
        shape = self._values.shape_of(bias)
        if shape is None or len(shape) != _RANK:
            return False
        return all(
            dim == wanted or (isinstance(dim, int) and dim != 1)
            for dim, wanted in ((shape[-2], call.queries), (shape[-1], call.columns))
        )

    def _expanded(self, op: Builder, call: AttentionCall, bias: gs.Tensor, shape: tuple[Dim, ...] | None) -> gs.Tensor:
        one = np.array([1], np.int64)
        wide = shape is not None and len(shape) > 0 and shape[-1] == call.columns
        columns = one if wide else call.size(self._sizes, op, "keys")
        target = op.Concat(one, one, call.size(self._sizes, op, "queries"), columns, axis=0)
        target.dtype, target.shape = np.dtype(np.int64), [4]
        expanded: gs.Variable = op.Expand(bias, target)
        return expanded

    def _band(self, op: Builder, call: AttentionCall, causal: bool, window: int) -> gs.Tensor:
        """Return [.., S, T]: the bias inside of the band, the lowest number outside."""
        dtype = np.dtype(self._dtype(call))
        scalar = np.array(0, np.int64)
        total = op.Squeeze(call.size(self._sizes, op, "keys"), [0])
        queries = op.Squeeze(call.size(self._sizes, op, "queries"), [0])
        row = op.Unsqueeze(op.Range(op.Sub(total, queries), total, np.array(1, np.int64)), [0, 1, 3])
        column = op.Range(scalar, total, np.array(1, np.int64))
        inside = None
        if causal:
            inside = op.LessOrEqual(column, row)
        if window:
            near = op.Greater(column, op.Sub(row, np.array(window, np.int64)))
            inside = near if inside is None else op.And(inside, near)
        bias = call.inputs.get("bias")
        kept = op.constant(np.zeros((), dtype)) if bias is None else bias
        lowest = op.constant(np.array(-np.inf if call.form.zero_rows else np.finfo(dtype).min, dtype))
        band: gs.Variable = op.Where(inside, kept, lowest)
        return band


def _seen(bias: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor] | None:
    """Return what is visible, and the axes to unsqueeze, of Unsqueeze(Where(visible, 0, lowest), axes)."""
    outer = bias.inputs[0] if isinstance(bias, gs.Variable) and len(bias.inputs) == 1 else None
    if outer is None or outer.op != "Unsqueeze" or len(outer.inputs) != 2:
        return None
    inner = outer.inputs[0].inputs[0] if isinstance(outer.inputs[0], gs.Variable) and outer.inputs[0].inputs else None
    if inner is None or inner.op != "Where":
        return None
    nothing, low = constant_value(inner.inputs[1]), constant_value(inner.inputs[2])
    if nothing is None or low is None or nothing.size != 1 or low.size != 1 or nothing.item() != 0:
        return None
    return (inner.inputs[0], outer.inputs[1]) if low.item() <= np.finfo(low.dtype).min else None
