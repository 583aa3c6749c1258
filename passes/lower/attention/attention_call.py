"""An attention that is about to be lowered: its operands by name, its sizes, and how its operands are laid out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.attention import AttentionForm, attention_form
from onnxslim_llm.ir.shapes import SymbolicValues
from onnxslim_llm.ir.shapes.dims import Dim, Expr
from onnxslim_llm.ir.shapes.symbolic import UNKNOWN
from onnxslim_llm.passes.lower.attention.input_sizes import InputSizes
from onnxslim_llm.rewrite.edit import Builder

__all__ = ["AttentionCall"]


@dataclass
class AttentionCall:
    """A call of the attention concept.

    Attributes:
        node: The call.
        form: Which steps and operands it has.
        inputs, outputs: Its tensors by formal name.
        q_heads, kv_heads, scale, softcap, window: Its attributes.
        batch, queries, past, keys: B, S, P and T as far as they are known; `past` is 0 without a cache.
        columns: T as the bias has it: the same number, though a name of its own ("total_sequence_length") may stand
            for it.
    """

    node: gs.Node
    form: AttentionForm
    inputs: dict[str, gs.Tensor]
    outputs: dict[str, gs.Variable]
    q_heads: int
    kv_heads: int
    scale: float
    softcap: float
    window: int
    batch: Dim | None
    queries: Dim | None
    past: Dim | None
    keys: Dim | None
    columns: Dim | None
    head_size: Dim | None
    value_size: Dim | None

    @classmethod
    def of(cls, node: gs.Node, values: SymbolicValues) -> AttentionCall:
        """Read a call."""
        form = attention_form(node)
        inputs = dict(zip(form.inputs, node.inputs, strict=True))
        rows = 2 if form.heads_major else 1
        q_heads, kv_heads = int(node.attrs["q_num_heads"]), int(node.attrs["kv_num_heads"])

        def size(name: str, axis: int) -> Dim | None:
            shape = values.shape_of(inputs[name]) if name in inputs else None
            return _known(shape[axis]) if shape is not None and len(shape) > 2 else None

        queries, new = size("Q", rows), size("K", rows)
        new = size("V", rows) if new is None else new
        past: Dim | None = size("past_key", 2) if form.past else 0
        if form.past and new is None:
            new = queries  # what a cache grows by
        return cls(
            node=node,
            form=form,
            inputs=inputs,
            outputs=dict(zip(form.outputs, node.outputs, strict=True)),
            q_heads=q_heads,
            kv_heads=kv_heads,
            scale=float(node.attrs["scale"]),
            softcap=float(node.attrs["softcap"]) if form.softcap else 0.0,
            window=int(node.attrs["window"]) if form.window else 0,
            batch=size("Q", 0),
            queries=queries,
            past=past,
            keys=None if past is None or new is None else past + new,
            columns=_columns(values, inputs.get("bias")),
            head_size=_per_head(size("Q", -1), 1 if form.heads_major else q_heads),
            value_size=_per_head(size("V", -1), 1 if form.heads_major else kv_heads),
        )

    @property
    def grows(self) -> bool:
        """Whether the keys surely are the past and one new key for each query: P = T - S is the past's length."""
        known = self.queries is not None and self.past is not None
        return self.form.past or (known and self.keys == self.queries)

    def total(self, sizes: InputSizes) -> gs.Tensor | None:
        """Return T, or None if no input has it."""
        found = sizes.of(self.columns)
        return sizes.of(self.keys) if found is None else found

    def size(self, sizes: InputSizes, op: Builder, which: str) -> gs.Tensor:
        """Return S ("queries"), T ("keys") or B ("batch") as a tensor [1]."""
        found = self.total(sizes) if which == "keys" else sizes.of(getattr(self, which))
        if found is not None:
            return found
        rows = 2 if self.form.heads_major else 1
        if which == "batch":
            return InputSizes.read(op, self.inputs["Q"], 0)
        if which == "queries":
            return InputSizes.read(op, self.inputs["Q"], rows)
        new = InputSizes.read(op, self.inputs["K"], rows)
        if not self.form.past:
            return new
        total: gs.Variable = op.Add(InputSizes.read(op, self.inputs["past_key"], 2), new)
        total.dtype, total.shape = np.dtype(np.int64), [1]
        return total

    def tokens_first(self, op: Builder, name: str) -> gs.Tensor:
        """Return Q, K or V as [B, S, H * D]."""
        tensor = self.inputs[name]
        if not self.form.heads_major:
            return tensor
        turned = op.Transpose(tensor, perm=[0, 2, 1, 3])
        flat: gs.Variable = op.Reshape(turned, [0, 0, -1])
        turned.dtype = flat.dtype = tensor.dtype
        return flat

    def heads_first(self, op: Builder, tensor: gs.Tensor) -> gs.Tensor:
        """Return a result [B, S, H * D] as the call lays it out."""
        if not self.form.heads_major:
            return tensor
        split = op.Reshape(tensor, [0, 0, self.q_heads, -1])
        turned: gs.Variable = op.Transpose(split, perm=[0, 2, 1, 3])
        split.dtype = turned.dtype = tensor.dtype
        return turned


def _known(dim: Dim) -> Dim | None:
    """Return a size unless it is one that nothing names: two of those may be the same, or not."""
    return None if isinstance(dim, Expr) and any(UNKNOWN in name for names, _ in dim.terms for name in names) else dim


def _columns(values: SymbolicValues, bias: gs.Tensor | None) -> Dim | None:
    shape = None if bias is None else values.shape_of(bias)
    return None if not shape or shape[-1] == 1 else _known(shape[-1])


def _per_head(size: Dim | None, heads: int) -> Dim | None:
    return size // heads if isinstance(size, int) else (size if heads == 1 else None)
