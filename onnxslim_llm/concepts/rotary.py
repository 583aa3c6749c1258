"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) with the angles' cosines and sines given.

X[B, S, H * D] holds heads of D; the first R elements of each are rotated, R/2 pairs, and the others pass. The tables
are cosines[B or 1, S, R/2] and sines, one row for each token: where they come from (a constant table looked up by
position, or angles computed in the graph) is not this concept's business.

rotary_half pairs element i with i + R/2 (GPT-NeoX, Llama); rotary_interleaved pairs 2i with 2i + 1 (GPT-J).
"""

from __future__ import annotations

from typing import Literal

from onnxslim_llm.concepts.concept import Concept

__all__ = ["ROTARY", "RotaryPairs", "rotary_concept"]

RotaryPairs = Literal["half", "interleaved"]

_HALF = """
        first, second = Split <axis = -1, num_outputs = 2> (turned)
        a = Mul (first, c)
        b = Mul (second, s)
        real = Sub (a, b)
        d = Mul (first, s)
        e = Mul (second, c)
        imaginary = Add (d, e)
        rotated = Concat <axis = -1> (real, imaginary)"""

_INTERLEAVED = """
        same = Constant <value_ints = [0, 0, 0]> ()
        two = Constant <value_ints = [2]> ()
        count = Div (size_1d, two)
        pair = Concat <axis = 0> (same, count, two)
        pairs = Reshape (turned, pair)
        even, odd = Split <axis = -1, num_outputs = 2> (pairs)
        last = Constant <value_ints = [-1]> ()
        first = Squeeze (even, last)
        second = Squeeze (odd, last)
        a = Mul (first, c)
        b = Mul (second, s)
        real = Sub (a, b)
        d = Mul (first, s)
        e = Mul (second, c)
        imaginary = Add (d, e)
        real_column = Unsqueeze (real, last)
        imaginary_column = Unsqueeze (imaginary, last)
        columns = Concat <axis = -1> (real_column, imaginary_column)
        flat = Concat <axis = 0> (same, size_1d)
        rotated = Reshape (columns, flat)"""


def _rotary(name: str, rotate: str) -> Concept:
    # Sizes are computed: Reshape cannot find a size for -1 beside one that is 0 (no token, no batch).
    return Concept(
        name,
        f"""<num_heads, rotary_dim> (X, cosines, sines) => (Y) {{
        heads = Constant <value_int: int = @num_heads> ()
        zero = Constant <value_ints = [0]> ()
        heads_1d = Unsqueeze (heads, zero)
        keep = Constant <value_ints = [0, 0]> ()
        rest = Constant <value_ints = [-1]> ()
        width = Shape <start = 2> (X)
        head_size = Div (width, heads_1d)
        split = Concat <axis = 0> (keep, heads_1d, head_size)
        by_head = Reshape (X, split)
        size = Constant <value_int: int = @rotary_dim> ()
        size_1d = Unsqueeze (size, zero)
        end = Constant <value_ints = [9223372036854775807]> ()
        turned = Slice (by_head, zero, size_1d, rest)
        passed = Slice (by_head, size_1d, end, rest)
        head_axis = Constant <value_ints = [2]> ()
        c = Unsqueeze (cosines, head_axis)
        s = Unsqueeze (sines, head_axis){rotate}
        whole = Concat <axis = -1> (rotated, passed)
        shape = Shape (X)
        Y = Reshape (whole, shape)
    }}""",
        min_opset=18,
    )


#: The two concepts. Attributes: num_heads H, rotary_dim R (even, at most D).
ROTARY: dict[RotaryPairs, Concept] = {
    "half": _rotary("RotaryHalf", _HALF),
    "interleaved": _rotary("RotaryInterleaved", _INTERLEAVED),
}


def rotary_concept(pairs: RotaryPairs) -> Concept:
    """Return the concept for a way of pairing elements."""
    return ROTARY[pairs]
