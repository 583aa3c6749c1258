"""Equations of Cast."""

from __future__ import annotations

from typing import Any

import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.ir.weights import dtypes
from onnxslim_llm.passes.cleanup.facts import widens
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.facts import onnx_type
from onnxslim_llm.rewrite.matcher import Match
from onnxslim_llm.rewrite.rule import Refusal, Rule, algebra

__all__ = ["TYPES"]


def _has_type(match: Match) -> Refusal | None:
    if onnx_type(match["x"]) == dtypes.onnx_dtype(match.attributes["to"]):
        return None
    return Refusal("it changes the type", match.root.name)


def _preserves(match: Match) -> Refusal | None:
    source, through = onnx_type(match["x"]), dtypes.onnx_dtype(match.attributes["through"])
    if source is None:
        return Refusal("the type of its input is not known", match["x"].name)
    if dtypes.onnx_dtype(match.attributes["to"]) == TensorProto.STRING or not widens(source, through):
        return Refusal("the first Cast may round", match.root.name)
    return None


def _cast(op: Builder, x: gs.Tensor, match: Match) -> Any:
    return op.Cast(x, **match.root.attrs)


def _types_known(match: Match) -> Refusal | None:
    if onnx_type(match["like"]) is None:
        return Refusal("the type to cast to is not known", match["like"].name)
    return None


def _cast_like(op: Builder, x: gs.Tensor, like: gs.Tensor, match: Match) -> Any:
    to = onnx_type(like)
    return x if onnx_type(x) == to else op.Cast(x, to=to, **match.root.attrs)


TYPES: tuple[Rule, ...] = (
    algebra("cast(x, type of x) -> x", lambda op, x: op.Cast(x, to=op.bind("to")), lambda op, x: x, _has_type),
    algebra(
        "cast(cast(x, wider), t) -> cast(x, t)",
        lambda op, x: op.Cast(op.Cast(x, to=op.bind("through")), to=op.bind("to")),
        _cast,
        _preserves,
    ),
    algebra("castlike(x, y) -> cast(x)", lambda op, x, like: op.CastLike(x, like), _cast_like, _types_known),
)
