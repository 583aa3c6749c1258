"""What looks like a rotary embedding and is none, or one that cannot be expressed: left alone, with the reason."""
# ruff: noqa: E501 (one graph a line)

from __future__ import annotations

import numpy as np
import pytest
from fusion_checks import floats, fuse, proto
from rotary_models import ANGLES, PLAIN, fused, model

from onnxslim_llm.passes.fuse.fuse_rotary import FuseRotary

SLICES = "x1 = Slice (x, i0, i4, last)  x2 = Slice (x, i4, end, last)"
SUM = "a = Mul (x, c)  b = Mul (turned, s)  y = Add (a, b)"
#: (body, a part of the reason)
MISSES = {
    "the wrong sign": (
        f"{ANGLES}  {SLICES}  m = Neg (x1)  turned = Concat <axis = -1> (x2, m)  {SUM}",
        "backwards",
    ),
    "the wrong sign by subtraction": (ANGLES + PLAIN.replace("Add", "Sub"), "backwards"),
    "no sign": (f"{ANGLES}  {SLICES}  turned = Concat <axis = -1> (x2, x1)  {SUM}", "does not rotate"),
    "both signs": (
        f"{ANGLES}  {SLICES}  w = Concat <axis = -1> (x2, x1)  turned = Neg (w)  {SUM}",
        "does not rotate",
    ),
    "the cosine negated": (
        f"{ANGLES}  {SLICES}  m = Neg (x2)  turned = Concat <axis = -1> (m, x1)  a = Mul (x, c)  b = Mul (turned, s)  y = Sub (b, a)",
        "a cosine is negated",
    ),
    "halves of different angles": (
        "both = Concat <axis = -1> (f, g)  c0 = Cos (both)  s0 = Sin (both)  c = Unsqueeze (c0, i1)  s = Unsqueeze (s0, i1)"
        + PLAIN,
        "cosines of a pair are not known to be equal",
    ),
    "sines that differ": (
        "both = Concat <axis = -1> (f, f)  mixed = Concat <axis = -1> (f, g)  c0 = Cos (both)  s0 = Sin (mixed)  c = Unsqueeze (c0, i1)  s = Unsqueeze (s0, i1)"
        + PLAIN,
        "sines of a pair are not known to be equal",
    ),
    "tables of unequal halves": (
        "c0 = Gather (cache, p)  s0 = Gather (other, p)  c = Unsqueeze (c0, i1)  s = Unsqueeze (s0, i1)" + PLAIN,
        "cosines of a pair are not known to be equal",
    ),
    "cosine and sine of different angles": (
        "b1 = Concat <axis = -1> (f, f)  b2 = Concat <axis = -1> (g, g)  c0 = Cos (b1)  s0 = Sin (b2)  c = Unsqueeze (c0, i1)  s = Unsqueeze (s0, i1)"
        + PLAIN,
        "not those of one angle",
    ),
    "cosine and sine exchanged": (
        ANGLES.replace("Cos", "?").replace("Sin", "Cos").replace("?", "Sin") + PLAIN,
        "not those of one angle",
    ),
    "only the cosine scaled": (
        "both = Concat <axis = -1> (f, f)  c0 = Cos (both)  c1 = Mul (c0, scale)  s0 = Sin (both)  c = Unsqueeze (c1, i1)  s = Unsqueeze (s0, i1)"
        + PLAIN,
        "not scaled alike",
    ),
    "bounds that do not halve": (
        f"{ANGLES}  x1 = Slice (x, i0, i3, last)  x2 = Slice (x, i3, end, last)  m = Neg (x2)  turned = Concat <axis = -1> (m, x1)  {SUM}",
        "neither by halves nor with their neighbours",
    ),
    "an element left out": (
        ANGLES
        + "  x1 = Slice (x, i0, i4, last)  x2 = Slice (x, i3, i7, last)  m = Neg (x2)  turned = Concat <axis = -1> (m, x1)  "
        + SUM,
        "neither by halves nor with their neighbours",
    ),
    "the passed part reversed": (
        "f2 = Slice (f, i0, i2, last)  both = Concat <axis = -1> (f2, f2)  c0 = Cos (both)  s0 = Sin (both)  c = Unsqueeze (c0, i1)  s = Unsqueeze (s0, i1)  "
        "r = Slice (x, i0, i4, last)  tail = Gather <axis = -1> (x, backwards)  x1 = Slice (r, i0, i2, last)  x2 = Slice (r, i2, end, last)  m = Neg (x2)  "
        "turned = Concat <axis = -1> (m, x1)  a = Mul (r, c)  b = Mul (turned, s)  z = Add (a, b)  y = Concat <axis = -1> (z, tail)",
        "",
    ),
    "tables of each head": (
        "both = Concat <axis = -1> (f, f)  f4 = Unsqueeze (both, i1)  f5 = Mul (f4, by_head)  c = Cos (f5)  s = Sin (f5)"
        + PLAIN,
        "differ from head to head",
    ),
    "one angle for all pairs": (
        "f1 = Slice (f, i0, i1, last)  f4 = Unsqueeze (f1, i1)  c = Cos (f4)  s = Sin (f4)" + PLAIN,
        "come from several tensors, or are one for all pairs",
    ),
    "tables without tokens": (
        "f1 = ReduceMax (f, i1)  both = Concat <axis = -1> (f1, f1)  f4 = Unsqueeze (both, i1)  c = Cos (f4)  s = Sin (f4)"
        + PLAIN,
        "do not depend on the token",
    ),
}
CONSTANTS = {
    "scale": np.array(1.25, np.float32),
    "cache": floats(8, 8),
    "other": floats(8, 8, seed=1),
    "by_head": floats(1, 4, 1, 1),
    "backwards": np.array([7, 6, 5, 4]),
}


@pytest.mark.parametrize(("body", "reason"), MISSES.values(), ids=MISSES.keys())
def test_near_misses(body: str, reason: str) -> None:
    result = fused(model(body, **CONSTANTS))
    if not reason:  # its inner rotation is one of its own
        assert result.sites == 1
        return
    assert not result.sites
    assert reason in result.reasons
    assert result.reasons.startswith("rotary: ")


def test_an_inner_value_that_is_an_output_too() -> None:
    result = fused(model(ANGLES + PLAIN, "float[B, H, S, D] y, float[B, H, S, D] a"))
    assert not result.sites
    assert "an inner tensor is also a graph output at 'a'" in result.reasons


def test_an_inner_value_that_is_read_elsewhere() -> None:
    result = fused(model(ANGLES + PLAIN + "  q = Exp (b)", "float[B, H, S, D] y, float[B, H, S, D] q"))
    assert not result.sites
    assert "an inner tensor is used elsewhere too at 'b'" in result.reasons


def test_a_moved_half_that_is_an_output_too_stays() -> None:
    """What only moves elements is in front of the arithmetic: it can be read as before."""
    result = fused(model(ANGLES + PLAIN, "float[B, H, S, D] y, float[B, H, S, D] m"))
    assert result.sites == 1
    assert result.ops["Neg"] == 1


def test_the_number_of_heads_must_be_known() -> None:
    constants = {f"i{n}": np.array([n]) for n in (0, 1, 4)}
    source = proto(
        f"agraph (float[B, H, S, 8] x, float[B, S, 4] f) => (float[B, H, S, 8] y) {{ {ANGLES} {PLAIN} }}",
        18,
        last=np.array([-1]),
        end=np.array([2**63 - 1]),
        **constants,
    )
    result = fuse(FuseRotary(), source, {"x": floats(2, 4, 3, 8), "f": floats(2, 3, 4)})
    assert "the number of heads is not known" in result.reasons


def test_products_that_have_nothing_to_do_with_each_other_are_no_miss() -> None:
    result = fused(model("h = Sigmoid (x)  e = Exp (x)  w = Abs (x)  a = Mul (x, h)  b = Mul (e, w)  y = Add (a, b)"))
    assert not result.sites
    assert not result.reasons


def test_a_cached_key_behind_the_rotation_is_left_to_itself() -> None:
    body = ANGLES + PLAIN.replace("y = ", "z = ") + "  y = Concat <axis = 2> (x, z)"
    result = fused(model(body))
    assert result.sites == 1
    assert result.ops["Concat"] == 1


ORDERS = {
    "halves": [4, 5, 6, 7, 0, 1, 2, 3],
    "neighbours": [1, 0, 3, 2, 5, 4, 7, 6],
    "reversed": [7, 6, 5, 4, 3, 2, 1, 0],
    "itself": [0, 1, 2, 3, 4, 5, 6, 7],
}
SIGNS = {
    "first half": [-1, -1, -1, -1, 1, 1, 1, 1],
    "every second": [-1, 1, -1, 1, -1, 1, -1, 1],
    "second half": [1, 1, 1, 1, -1, -1, -1, -1],
    "none": [1] * 8,
}
COLUMNS = {
    "repeated": [0, 1, 2, 3, 0, 1, 2, 3],
    "twice each": [0, 0, 1, 1, 2, 2, 3, 3],
    "mixed": [0, 1, 2, 3, 1, 0, 3, 2],
}
ROTATIONS = {
    ("halves", "first half", "repeated", "repeated"),
    ("neighbours", "every second", "twice each", "twice each"),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("cosines", COLUMNS)
@pytest.mark.parametrize("sines", COLUMNS)
def test_of_all_ways_to_pair_sign_and_repeat_only_the_rotations_are_fused(
    order: str, signs: str, cosines: str, sines: str
) -> None:
    body = """
        f4 = Unsqueeze (f, i1)  fc = Gather <axis = -1> (f4, cc)  c = Cos (fc)  fs = Gather <axis = -1> (f4, cs)
        s = Sin (fs)  moved = Gather <axis = -1> (x, order)  turned = Mul (moved, signs)
        a = Mul (x, c)  b = Mul (turned, s)  y = Add (a, b)"""
    constants = {
        "order": np.array(ORDERS[order]),
        "signs": np.array(SIGNS[signs], np.float32),
        "cc": np.array(COLUMNS[cosines]),
        "cs": np.array(COLUMNS[sines]),
    }
    assert fused(model(body, **constants)).sites == ((order, signs, cosines, sines) in ROTATIONS)
