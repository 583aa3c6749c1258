"""The sizes of an attention as expressions of the input sizes."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.attention import AttentionForm
from onnxslim_llm.ir.shapes import SymbolicValues
from onnxslim_llm.ir.shapes.dims import Dim
from onnxslim_llm.ir.shapes.symbolic import UNKNOWN
from onnxslim_llm.passes.fuse.masks.points import Axes
from onnxslim_llm.rewrite.probe import symbols_of

__all__ = ["attention_axes"]

_RANK = 4


def attention_axes(values: SymbolicValues, node: gs.Node, form: AttentionForm) -> Axes | str:
    """Return the sizes of the attention `node`, or why they are not known.

    A size of Q, K or V that inference lost is taken from the bias, which has to fit: a last axis that is not 1 is T.
    """
    names = dict(zip(form.inputs, node.inputs, strict=False))
    rows = 2 if form.heads_major else 1
    bias = values.shape_of(names["bias"]) or ()
    batch = _first(_size(values, names[name], 0) for name in ("Q", "K", "V", *(["past_key"] if form.past else [])))
    if batch is None and len(bias) == _RANK and bias[0] != 1:
        batch = bias[0]
    queries = _size(values, names["Q"], rows)
    if queries is None and len(bias) > 1 and bias[-2] != 1:
        queries = _named(bias[-2])
    past = _size(values, names["past_key"], 2) if form.past else 0
    new = _first(_size(values, names[name], rows) for name in ("K", "V"))
    if new is None and form.past:
        new = queries  # a cache grows by the new tokens; with cross-attention there is none to append to
    keys = past + new if past is not None and new is not None else None
    if keys is None and bias and bias[-1] != 1:
        keys = _named(bias[-1])
    if batch is None or queries is None or past is None or keys is None:
        return "the sizes of the attention are not known"
    return Axes(batch, queries, past, keys)


def _size(values: SymbolicValues, tensor: gs.Tensor, axis: int) -> Dim | None:
    shape = values.shape_of(tensor)
    return _named(shape[axis]) if shape is not None and axis < len(shape) else None


def _named(dim: Dim) -> Dim | None:
    return None if any(UNKNOWN in name for name in symbols_of(dim)) else dim


def _first(dims: Iterable[Dim | None]) -> Dim | None:
    return next((dim for dim in dims if dim is not None), None)
