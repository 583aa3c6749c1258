"""What the norms have in common: how exporters spell the root of a mean square, weights, and casts around a norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.ir.shapes import shape_of
from onnxslim_llm.ir.weights import ViewWeight, dtypes, weight_of
from onnxslim_llm.rewrite.constants import constant_tensor
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.facts import known_shape, onnx_type, rank_of
from onnxslim_llm.rewrite.matcher import Match
from onnxslim_llm.rewrite.passes import Change
from onnxslim_llm.rewrite.pattern import PatternBuilder
from onnxslim_llm.rewrite.rule import Refusal

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = [
    "NARROW_TYPES",
    "check_float32",
    "check_narrow",
    "check_vector",
    "epsilon_of",
    "inverse_root",
    "keep_skips_at_means",
    "ones_like",
    "root_mean_square",
    "vector",
]

#: Types whose norms exporters compute in float32 and cast back.
NARROW_TYPES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)

#: What lies between the mean and the end of a norm, and how many of these nodes.
_BETWEEN = frozenset(["Add", "Cast", "Div", "Identity", "Mul", "Pow", "Reciprocal", "Sqrt", "Sub"])
_NORMS = frozenset(["LayerNormalization", "RMSNorm", "RMSNormalization", "SimplifiedLayerNormalization"])
_REACH = 8


def root_mean_square(op: PatternBuilder, x: Any) -> Any:
    """Return the pattern sqrt(mean(x^2) + epsilon) over the last axis, as Sqrt or as a power."""
    shifted = _shifted_mean_square(op, x)
    return op.either(op.Sqrt(shifted), op.Pow(shifted, 0.5))


def inverse_root(op: PatternBuilder, x: Any) -> Any:
    """Return the pattern 1 / sqrt(mean(x^2) + epsilon)."""
    root = root_mean_square(op, x)
    return op.either(op.Reciprocal(root), op.Div(1.0, root), op.Pow(_shifted_mean_square(op, x), -0.5))


def _shifted_mean_square(op: PatternBuilder, x: Any) -> Any:
    square = op.either(op.Mul(x, x), op.Pow(x, 2.0))
    return op.Add(op.ReduceMean(square, axes=[-1], keepdims=1), op.const("epsilon"))


def epsilon_of(match: Match) -> float:
    """Return the epsilon of a match that `check_float32` has seen."""
    epsilon = match.scalar("epsilon")
    assert epsilon is not None
    return epsilon


def check_float32(match: Match, x: gs.Tensor) -> Refusal | None:
    """Refuse what the norm operators would compute otherwise: they take means in float32, over a known width."""
    kind = onnx_type(x)
    if kind is None:
        return Refusal("the type is unknown", x.name)
    if kind != TensorProto.FLOAT:
        name = TensorProto.DataType.Name(kind).lower()
        return Refusal(f"the mean is taken in {name}, a norm operator takes it in float32", x.name)
    shape = shape_of(x)
    if not shape or not isinstance(shape[-1], int):
        return Refusal("the size of the last axis is unknown", x.name)
    epsilon = match["epsilon"]
    value, rank = match.scalar("epsilon"), rank_of(epsilon)
    if value is None or rank is None or rank > len(shape):
        return Refusal("epsilon is no single number", epsilon.name)
    if not (np.isfinite(value) and value > 0):
        return Refusal(f"epsilon is {value}", epsilon.name)
    return None


def check_narrow(match: Match) -> Refusal | None:
    """Refuse a cast of the result to another type than the input was cast from, and one behind the weight."""
    weight = match.value("weight")
    if weight is None or not np.all(weight == 1):
        return Refusal("the weight is multiplied in float32, before the cast: the casts stay", match["weight"].name)
    narrow = onnx_type(match["x"])
    if narrow not in NARROW_TYPES:
        return Refusal("the input of the norm is of no 16-bit type", match["x"].name)
    if int(match.attributes["to"]) != narrow:
        return Refusal("the norm's result is cast to another type than its input has", match.root.name)
    return None


def check_vector(match: Match, name: str, what: str) -> Refusal | None:
    """Refuse a weight or bias that is not one number for each element of the last axis, or of another type."""
    tensor, x = match[name], match["x"]
    shape, wanted = known_shape(tensor), shape_of(x)
    if not shape or not wanted or len(shape) > len(wanted):
        return Refusal(f"the {what} is no vector", tensor.name)
    if shape[-1] != wanted[-1] or any(size != 1 for size in shape[:-1]):
        return Refusal(f"the {what} has shape {list(shape)}, expected [{wanted[-1]}]", tensor.name)
    if onnx_type(tensor) != onnx_type(x):
        return Refusal(f"the {what} is of another type than the input", tensor.name)
    return None


def vector(op: Builder, tensor: gs.Tensor) -> gs.Tensor:
    """Return a weight of shape [1, ..., D] as [D]; a constant stays the same bytes."""
    if rank_of(tensor) == 1:
        return tensor
    stored = constant_tensor(tensor)
    if stored is None:
        reshaped: gs.Tensor = op.Reshape(tensor, [-1])
        return reshaped
    weight = weight_of(stored)
    return op.constant(ViewWeight.reshape(weight, (weight.size,)))


def ones_like(op: Builder, x: gs.Tensor) -> gs.Tensor:
    """Return the weight of a norm without one: ones [D] in the type of x."""
    shape, kind = shape_of(x), onnx_type(x)
    assert shape
    assert kind is not None
    return op.constant(np.ones(shape[-1], dtypes.numpy_dtype(kind)))


def keep_skips_at_means(model: Model, change: Change, fused: Iterable[str]) -> None:
    """Keep one near miss a mean, the one closest to it, and drop those that have nothing to do with a norm.

    Args:
        model: The model after the rules.
        change: Its `skipped` is filtered.
        fused: Names of tensors that norms make now.
    """
    makers = {t.name: node for graph in model.graphs() for node in graph.nodes for t in node.outputs}
    done = set(fused)
    missed = {id(makers[skip.where]) for skip in change.skipped if skip.where in makers}
    change.skipped = [
        skip
        for skip in change.skipped
        if skip.where in makers and skip.where not in done and _is_next_to_a_mean(makers[skip.where], missed)
    ]


def _is_next_to_a_mean(start: gs.Node, missed: set[int]) -> bool:
    stack, seen, found = [(start, 0)], set(), False
    while stack:
        node, depth = stack.pop()
        if id(node) in seen or depth > _REACH:
            continue
        seen.add(id(node))
        if node is not start and id(node) in missed:
            return False
        if node.op.startswith("Reduce") or node.op in _NORMS:
            found = True
        elif node.op in _BETWEEN:
            stack += [(t.inputs[0], depth + 1) for t in node.inputs if isinstance(t, gs.Variable) and t.inputs]
    return found
