"""Rotary embeddings in ONNX text, part by part, so that tests can put the spellings of exporters together."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from fusion_checks import Array, Fused, floats, fuse, proto

from onnxslim_llm.passes.fuse.fuse_rotary import FuseRotary

__all__ = ["ANGLES", "HALF", "INPUTS", "PLAIN", "fused", "model"]

HEADS, WIDTH, HALF = 4, 8, 4

#: Values of inputs: batch 2, 3 tokens, 4 heads of 8.
INPUTS: dict[str, Array] = {
    "x": floats(2, HEADS, 3, WIDTH),
    "k": floats(2, 2, 3, WIDTH, seed=1),
    "t": floats(2, 3, HEADS, WIDTH, seed=2),  # tokens before heads
    "f": floats(2, 3, HALF, seed=3),
    "g": floats(2, 3, HALF, seed=4),
    "p": np.array([[0, 1, 2], [4, 5, 3]]),
}
_TYPES = {
    "x": "float[B, 4, S, 8]",
    "k": "float[B, 2, S, 8]",
    "t": "float[B, S, 4, 8]",
    "f": "float[B, S, 4]",
    "g": "float[B, S, 4]",
    "p": "int64[B, S]",
}
_CONSTANTS: dict[str, Array] = {
    **{f"i{n}": np.array([n]) for n in range(9)},
    **{f"n{n}": np.array(n) for n in range(3)},
    "last": np.array([-1]),
    "end": np.array([2**63 - 1]),
    "minus": np.array(-1, np.float32),
    "fours": np.array([4, 4]),
}

#: Cosines and sines for every element of a head, of angles that are given for each pair.
ANGLES = """
    both = Concat <axis = -1> (f, f)  c0 = Cos (both)  s0 = Sin (both)
    c = Unsqueeze (c0, i1)  s = Unsqueeze (s0, i1)"""
#: The rotation as transformers writes it.
PLAIN = """
    x1 = Slice (x, i0, i4, last)  x2 = Slice (x, i4, end, last)  m = Neg (x2)  turned = Concat <axis = -1> (m, x1)
    a = Mul (x, c)  b = Mul (turned, s)  y = Add (a, b)"""


def model(body: str, out: str = "float[B, H, S, D] y", opset: int = 18, **constants: Array) -> onnx.ModelProto:
    """A graph with those of the usual inputs and constants that its text mentions."""
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    inputs = ", ".join(f"{kind} {name}" for name, kind in _TYPES.items() if name in words)
    known = {**_CONSTANTS, **constants}
    return proto(f"agraph ({inputs}) => ({out}) {{ {body} }}", opset, **{n: v for n, v in known.items() if n in words})


def fused(source: onnx.ModelProto, **options: Any) -> Fused:
    """What the pass makes of a model."""
    feeds = {value.name: INPUTS[value.name] for value in source.graph.input}
    return fuse(FuseRotary(), source, feeds, **options)
