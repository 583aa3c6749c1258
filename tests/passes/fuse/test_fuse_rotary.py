"""Rotary embeddings in the spellings of exporters."""
# ruff: noqa: E501 (one part of a graph a line)

from __future__ import annotations

import re

import numpy as np
import pytest
from fusion_checks import Fused, floats, fuse, proto
from rotary_models import ANGLES, HALF, INPUTS, PLAIN, fused, model

from onnxslim_llm.concepts.concept import calls
from onnxslim_llm.concepts.rotary import ROTARY
from onnxslim_llm.passes.fuse.fuse_rotary import FuseRotary

SLICES = "x1 = Slice (x, i0, i4, last)  x2 = Slice (x, i4, end, last)"
SIGNS = np.array([-1, -1, -1, -1, 1, 1, 1, 1], np.float32)
FREQUENCIES = np.array([1, 0.1, 0.01, 0.001], np.float32)
#: Half floats have 11 bits: two roundings of numbers up to four.
HALF_FLOAT = 4 * 2.0**-11

#: Rotations of halves; x is [B, 4, S, 8] and c, s are [B, 1, S, 8].
HALVES = {
    "slices and neg": PLAIN,
    "operands the other way round": f"""
        {SLICES}  m = Neg (x2)  turned = Concat <axis = 3> (m, x1)  a = Mul (c, x)  b = Mul (s, turned)  y = Add (b, a)""",
    "split": """
        x1, x2 = Split <axis = -1> (x, fours)  m = Neg (x2)  turned = Concat <axis = -1> (m, x1)
        a = Mul (x, c)  b = Mul (turned, s)  y = Add (a, b)""",
    "chunks": """
        x1, x2 = Split <axis = -1, num_outputs = 2> (x)  m = Neg (x2)  turned = Concat <axis = -1> (m, x1)
        a = Mul (x, c)  b = Mul (turned, s)  y = Sum (a, b)""",
    "times minus one": f"""
        {SLICES}  m = Mul (minus, x2)  turned = Concat <axis = -1> (m, x1)
        a = Mul (x, c)  b = Mul (turned, s)  y = Add (a, b)""",
    "negated product": f"""
        {SLICES}  m = Neg (x1)  turned = Concat <axis = -1> (x2, m)
        a = Mul (x, c)  b = Mul (turned, s)  n = Neg (b)  y = Add (a, n)""",
    "subtracted": f"""
        {SLICES}  m = Neg (x1)  turned = Concat <axis = -1> (x2, m)
        a = Mul (x, c)  b = Mul (turned, s)  y = Sub (a, b)""",
    "a vector of signs": f"""
        {SLICES}  swapped = Concat <axis = -1> (x2, x1)  turned = Mul (swapped, signs)
        a = Mul (x, c)  b = Mul (turned, s)  y = Add (a, b)""",
    "signs in the table": f"""
        {SLICES}  swapped = Concat <axis = -1> (x2, x1)
        s1 = Slice (s, i0, i4, last)  s2 = Slice (s, i4, i8, last)  n = Neg (s1)  signed = Concat <axis = -1> (n, s2)
        a = Mul (x, c)  b = Mul (swapped, signed)  y = Add (a, b)""",
    "gathered": """
        swapped = Gather <axis = -1> (x, order)  turned = Mul (swapped, signs)
        a = Mul (x, c)  b = Mul (turned, s)  y = Add (a, b)""",
    "each half for itself": f"""
        {SLICES}  c1 = Slice (c, i0, i4, last)  s1 = Slice (s, i0, i4, last)
        a = Mul (x1, c1)  b = Mul (x2, s1)  real = Sub (a, b)
        d = Mul (x2, c1)  e = Mul (x1, s1)  imaginary = Add (d, e)
        y = Concat <axis = -1> (real, imaginary)""",
}


def check(result: Fused, pairs: str = "Half", sites: int = 1, tables: int = 1) -> list[dict[str, int]]:
    """Check how many rotary embeddings there are, and that they share their tables; return their attributes."""
    found = [node for _, node in calls(result.model, *ROTARY.values())]
    assert result.sites == len(found) == sites
    assert {node.op for node in found} == {f"Rotary{pairs}"}
    assert len({tuple(id(t) for t in node.inputs[1:]) for node in found}) == tables
    assert not result.reasons
    return [dict(node.attrs) for node in found]


@pytest.mark.parametrize("body", HALVES.values(), ids=HALVES.keys())
def test_halves(body: str) -> None:
    result = fused(model(ANGLES + body, signs=SIGNS, order=np.array([4, 5, 6, 7, 0, 1, 2, 3])))
    assert check(result) == [{"num_heads": 4, "rotary_dim": 8}]
    assert result.ops["Cos"] == result.ops["Sin"] == 1
    assert not result.ops["Unsqueeze"] + result.ops["Concat"] + result.ops["Squeeze"]


#: Ways to the tables c and s [B or 1, 1, S, 8], or less; the second item counts operators that are left.
TABLES = {
    "rank four": (
        "f4 = Unsqueeze (f, i1)  both = Concat <axis = -1> (f4, f4)  c = Cos (both)  s = Sin (both)",
        {"Concat": 0, "Unsqueeze": 0},
    ),
    "rank three by way of reshape": (
        "both = Concat <axis = -1> (f, f)  c0 = Cos (both)  s0 = Sin (both)  "
        "c = Reshape (c0, to4)  s = Reshape (s0, to4)",
        {"Cos": 1},
    ),
    "scaled": (
        "both = Concat <axis = -1> (f, f)  c0 = Cos (both)  c1 = Mul (c0, scale)  s0 = Sin (both)  s1 = Mul (s0, scale)  "
        "c = Unsqueeze (c1, i1)  s = Unsqueeze (s1, i1)",
        {"Mul": 2, "Concat": 0},
    ),
    "repeated after the cosine": (
        "c0 = Cos (f)  c1 = Concat <axis = -1> (c0, c0)  s0 = Sin (f)  s1 = Concat <axis = -1> (s0, s0)  "
        "c = Unsqueeze (c1, i1)  s = Unsqueeze (s1, i1)",
        {"Concat": 0, "Unsqueeze": 0},
    ),
    "tiled": (
        "both = Tile (f, twice)  c0 = Cos (both)  s0 = Sin (both)  c = Unsqueeze (c0, i1)  s = Unsqueeze (s0, i1)",
        {"Tile": 0},
    ),
    "computed twice": (
        "b1 = Concat <axis = -1> (f, f)  c0 = Cos (b1)  b2 = Concat <axis = -1> (f, f)  s0 = Sin (b2)  "
        "c = Unsqueeze (c0, i1)  s = Unsqueeze (s0, i1)",
        {"Concat": 0},
    ),
    "from positions": (
        "p1 = Unsqueeze (p, i1)  p2 = Cast <to = 1> (p1)  f0 = MatMul (rows, p2)  f1 = Transpose <perm = [0, 2, 1]> (f0)  "
        "both = Concat <axis = -1> (f1, f1)  c0 = Cos (both)  s0 = Sin (both)  "
        "c = Unsqueeze (c0, i1)  s = Unsqueeze (s0, i1)",
        {"MatMul": 1, "Concat": 0, "Unsqueeze": 1},
    ),
    "from an outer product of doubled frequencies": (
        "p1 = Unsqueeze (p, last)  p2 = Cast <to = 1> (p1)  f1 = MatMul (p2, doubled)  c0 = Cos (f1)  s0 = Sin (f1)  "
        "c = Unsqueeze (c0, i1)  s = Unsqueeze (s0, i1)",
        {"MatMul": 1, "Slice": 0},
    ),
    "from einsum": (
        'p1 = Cast <to = 1> (p)  f1 = Einsum <equation = "bs,d->bsd"> (p1, inv)  both = Concat <axis = -1> (f1, f1)  '
        "c0 = Cos (both)  s0 = Sin (both)  c = Unsqueeze (c0, i1)  s = Unsqueeze (s0, i1)",
        {"Einsum": 1, "Concat": 0},
    ),
    "gathered by position": (
        "c0 = Gather (cache_c, p)  s0 = Gather (cache_s, p)  c = Unsqueeze (c0, i1)  s = Unsqueeze (s0, i1)",
        {"Gather": 2, "Unsqueeze": 0},
    ),
    "a range from the length of a cache": (
        "shape = Shape (x)  n = Gather (shape, n2)  stop = Add (n, n2)  r = Range (n2, stop, n1)  "
        "c = Gather (cache_c, r)  s = Gather (cache_s, r)",
        {"Gather": 3},
    ),
    "rank two": (
        "c = Slice (cache_c, i1, i4, i0)  s = Slice (cache_s, i1, i4, i0)",
        {"Unsqueeze": 2},
    ),
    "rows up to the length of the text": (
        "shape = Shape <start = 2, end = 3> (x)  n = Squeeze (shape)  r = Range (n0, n, n1)  r1 = Cast <to = 1> (r)  "
        'f1 = Einsum <equation = "i,j->ij"> (r1, inv)  both = Concat <axis = -1> (f1, f1)  c0 = Cos (both)  '
        "s0 = Sin (both)  c1 = Unsqueeze (c0, i0)  s1 = Unsqueeze (s0, i0)  stop = Abs (shape)  "
        "c = Slice (c1, i0, stop, i1, i1)  s = Slice (s1, i0, stop, i1, i1)",
        {"Concat": 0, "Slice": 2, "Unsqueeze": 2},
    ),
    "one row for all tokens, cut by a slice": (
        "f1 = Slice (f, i0, i1, i1)  both = Concat <axis = -1> (f1, f1)  c0 = Cos (both)  s0 = Sin (both)  "
        "c = Unsqueeze (c0, i1)  s = Unsqueeze (s0, i1)",
        {"Expand": 2},
    ),
    "sections of several positions": (
        "h = Add (f, g)  b1 = Concat <axis = -1> (f, f)  b2 = Concat <axis = -1> (h, h)  "
        "c1 = Cos (b1)  c2 = Cos (b2)  s1 = Sin (b1)  s2 = Sin (b2)  "
        "ca, cb, cc, cd = Split <axis = -1> (c1, sections)  ce, cf, cg, ch = Split <axis = -1> (c2, sections)  "
        "sa, sb, sc, sd = Split <axis = -1> (s1, sections)  se, sf, sg, sh = Split <axis = -1> (s2, sections)  "
        "c0 = Concat <axis = -1> (ca, cf, cc, ch)  s0 = Concat <axis = -1> (sa, sf, sc, sh)  "
        "c = Unsqueeze (c0, i1)  s = Unsqueeze (s0, i1)",
        {"Cos": 2},
    ),
}


@pytest.mark.parametrize(("tables", "left"), TABLES.values(), ids=TABLES.keys())
def test_tables(tables: str, left: dict[str, int]) -> None:
    angles = np.arange(16, dtype=np.float32)[:, None] * FREQUENCIES
    constants = {
        "to4": np.array([0, 1, -1, 8]),
        "scale": np.array(1.25, np.float32),
        "twice": np.array([1, 1, 2]),
        "rows": FREQUENCIES.reshape(1, HALF, 1),
        "inv": FREQUENCIES,
        "doubled": np.concatenate([FREQUENCIES, FREQUENCIES]).reshape(1, 1, 8),
        "cache_c": np.cos(np.concatenate([angles, angles], axis=-1)),
        "cache_s": np.sin(np.concatenate([angles, angles], axis=-1)),
        "sections": np.array([1, 3, 1, 3]),
    }
    result = fused(model(tables + PLAIN, **constants))
    assert check(result) == [{"num_heads": 4, "rotary_dim": 8}]
    assert {op: result.ops[op] for op in left} == left


def test_a_table_in_the_graph_is_halved() -> None:
    angles = np.arange(16, dtype=np.float32)[:, None] * FREQUENCIES
    both = np.concatenate([angles, angles], axis=-1)
    body = "c0 = Gather (cc, p)  s0 = Gather (cs, p)  c = Unsqueeze (c0, i1)  s = Unsqueeze (s0, i1)" + PLAIN
    result = fused(model(body, cc=np.cos(both), cs=np.sin(both)))
    [(_, node)] = calls(result.model, *ROTARY.values())
    assert [tuple(t.inputs[0].inputs[0].shape) for t in node.inputs[1:]] == [(16, HALF)] * 2


STRIDES = "e = Slice (x, i0, end, last, i2)  o = Slice (x, i1, end, last, i2)"
UNITS = "c = Cos (f4)  s = Sin (f4)"
PAIR = """
    a = Mul (e, c)  b = Mul (o, s)  real = Sub (a, b)  d = Mul (e, s)  q = Mul (o, c)  imaginary = Add (d, q)
    r1 = Unsqueeze (real, last)  j1 = Unsqueeze (imaginary, last)  z = Concat <axis = -1> (r1, j1)
    y = Reshape (z, back)"""
#: Rotations of neighbours.
NEIGHBOURS = {
    "strided slices": f"f4 = Unsqueeze (f, i1)  {UNITS}  {STRIDES}  {PAIR}",
    "an axis of pairs": f"""
        f4 = Unsqueeze (f, i1)  {UNITS}  z0 = Reshape (x, pairs)
        e1, o1 = Split <axis = -1, num_outputs = 2> (z0)  e = Squeeze (e1, last)  o = Squeeze (o1, last)  {PAIR}""",
    "an axis of pairs, gathered": f"""
        f4 = Unsqueeze (f, i1)  {UNITS}  z0 = Reshape (x, pairs)
        e = Gather <axis = -1> (z0, n0)  o = Gather <axis = -1> (z0, n1)  {PAIR}""",
    "complex numbers": f"""
        c0 = Cos (f)  s0 = Sin (f)  c1 = Unsqueeze (c0, last)  s1 = Unsqueeze (s0, last)
        cis = Concat <axis = -1> (c1, s1)  cis4 = Unsqueeze (cis, i1)
        c = Gather <axis = 4> (cis4, n0)  s = Gather <axis = 4> (cis4, n1)
        z0 = Reshape (x, pairs)  e = Gather <axis = -1> (z0, n0)  o = Gather <axis = -1> (z0, n1)  {PAIR}""",
    "repeated tables and every two rotated": f"""
        f1 = Unsqueeze (f, i3)  f2 = Expand (f1, two)  f3 = Reshape (f2, flat)  f4 = Unsqueeze (f3, i1)  {UNITS}
        {STRIDES}  m = Neg (o)  m1 = Unsqueeze (m, last)  e1 = Unsqueeze (e, last)
        z = Concat <axis = -1> (m1, e1)  turned = Reshape (z, back)
        a = Mul (x, c)  b = Mul (turned, s)  y = Add (a, b)""",
}


@pytest.mark.parametrize("body", NEIGHBOURS.values(), ids=NEIGHBOURS.keys())
def test_neighbours(body: str) -> None:
    shapes = {
        "back": np.array([0, 4, -1, 8]),
        "pairs": np.array([0, 0, 0, 4, 2]),
        "two": np.array([1, 1, 1, 2]),
        "flat": np.array([0, 0, 8]),
    }
    result = fused(model(body, **shapes))
    assert check(result, "Interleaved") == [{"num_heads": 4, "rotary_dim": 8}]
    assert result.ops["Cos"] == result.ops["Sin"] == 1


#: Other layouts and extents: (body, attributes).
LAYOUTS = {
    "tokens first": (
        "both = Concat <axis = -1> (f, f)  c0 = Cos (both)  s0 = Sin (both)  c = Unsqueeze (c0, i2)  "
        "s = Unsqueeze (s0, i2)" + PLAIN.replace("(x,", "(t,"),
        (4, 8),
    ),
    "one head without an axis": (
        "h = Squeeze (k1, i1)  c = Cos (f)  s = Sin (f)  k1 = Slice (k, i0, i1, i1)  "
        "x1 = Slice (h, i0, i4, last)  x2 = Slice (h, i4, i8, last)  a = Mul (x1, c)  b = Mul (x2, s)  z1 = Sub (a, b)  "
        "d = Mul (x1, s)  e = Mul (x2, c)  z2 = Add (d, e)  z = Concat <axis = -1> (z1, z2)  y = Unsqueeze (z, i1)",
        (1, 8),
    ),
    "all texts in one row, without a batch": (
        "h = Reshape (t, joined)  r = Reshape (f, rows)  both = Concat <axis = -1> (r, r)  c0 = Cos (both)  "
        "s0 = Sin (both)  c = Unsqueeze (c0, i1)  s = Unsqueeze (s0, i1)  x1 = Slice (h, i0, i4, last)  "
        "x2 = Slice (h, i4, end, last)  m = Neg (x2)  turned = Concat <axis = -1> (m, x1)  a = Mul (h, c)  "
        "b = Mul (turned, s)  z = Add (a, b)  y = Unsqueeze (z, i0)",
        (4, 8),
    ),
    "two axes of heads": (
        "h = Reshape (t, groups)  both = Concat <axis = -1> (f, f)  c0 = Cos (both)  s0 = Sin (both)  "
        "c = Unsqueeze (c0, middle)  s = Unsqueeze (s0, middle)  x1 = Slice (h, i0, i4, last)  "
        "x2 = Slice (h, i4, end, last)  m = Neg (x2)  turned = Concat <axis = -1> (m, x1)  a = Mul (h, c)  "
        "b = Mul (turned, s)  z = Add (a, b)  y = Reshape (z, heads)",
        (4, 8),
    ),
    "a part of the head": (
        "f2 = Slice (f, i0, i2, last)  both = Concat <axis = -1> (f2, f2)  c0 = Cos (both)  s0 = Sin (both)  "
        "c = Unsqueeze (c0, i1)  s = Unsqueeze (s0, i1)  r = Slice (x, i0, i4, last)  pass = Slice (x, i4, end, last)  "
        "x1 = Slice (r, i0, i2, last)  x2 = Slice (r, i2, end, last)  m = Neg (x2)  turned = Concat <axis = -1> (m, x1)  "
        "a = Mul (r, c)  b = Mul (turned, s)  z = Add (a, b)  y = Concat <axis = -1> (z, pass)",
        (4, 4),
    ),
    "nothing passes": (
        ANGLES + PLAIN.replace("y = Add", "z = Add") + "  pass = Slice (x, i8, end, last)  "
        "y = Concat <axis = -1> (z, pass)",
        (4, 8),
    ),
    "the head is a part of packed ones": (
        "w = Concat <axis = -1> (x, x, x)  h = Slice (w, i8, s16, last)" + ANGLES + PLAIN.replace("(x,", "(h,"),
        (4, 8),
    ),
    "rotated and passed parts cut from packed ones": (
        "w = Abs (xx)  xx = Concat <axis = -1> (x, x)  f2 = Slice (f, i0, i2, last)  both = Concat <axis = -1> (f2, f2)  "
        "c0 = Cos (both)  s0 = Sin (both)  c = Unsqueeze (c0, i1)  s = Unsqueeze (s0, i1)  r = Slice (w, i3, i7, last)  "
        "pass = Slice (w, i7, s11, last)  x1 = Slice (r, i0, i2, last)  x2 = Slice (r, i2, end, last)  m = Neg (x2)  "
        "turned = Concat <axis = -1> (m, x1)  a = Mul (r, c)  b = Mul (turned, s)  z = Add (a, b)  "
        "y = Concat <axis = -1> (z, pass)",
        (4, 4),
    ),
    "neighbours brought together first": (
        "z0 = Reshape (x, pairs)  z1 = Transpose <perm = [0, 1, 2, 4, 3]> (z0)  h = Reshape (z1, back)"
        + ANGLES
        + PLAIN.replace("(x,", "(h,"),
        (4, 8),
    ),
    "pairs have an axis of their own from the start": (
        "w = Reshape (t, pairs)  v = Neg (w)  u = Sigmoid (v)  c1 = Cos (f)  s1 = Sin (f)  c = Unsqueeze (c1, i2)  "
        "s = Unsqueeze (s1, i2)  e = Gather <axis = 4> (u, n0)  o = Gather <axis = 4> (u, n1)  "
        "a = Mul (e, c)  b = Mul (o, s)  z1 = Sub (a, b)  d = Mul (e, s)  q = Mul (o, c)  z2 = Add (d, q)  "
        "r1 = Unsqueeze (z1, last)  r2 = Unsqueeze (z2, last)  z = Concat <axis = -1> (r1, r2)  y = Reshape (z, flat)",
        (4, 8),
    ),
}


@pytest.mark.parametrize(("body", "attributes"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(body: str, attributes: tuple[int, int]) -> None:
    shapes = {
        "joined": np.array([-1, 4, 8]),
        "rows": np.array([-1, 4]),
        "groups": np.array([0, 0, 2, 2, 8]),
        "heads": np.array([0, 0, 4, 8]),
        "middle": np.array([2, 3]),
        "pairs": np.array([0, 0, 0, 4, 2]),
        "back": np.array([0, 4, -1, 8]),
        "flat": np.array([0, -1, 4, 8]),
        "s16": np.array([16]),
        "s11": np.array([11]),
    }
    ordered = "\n".join(_in_order(body))
    pairs = "Interleaved" if "own" in body or "z2 = Add (d, q)" in body else "Half"
    assert check(fused(model(ordered, **shapes)), pairs) == [
        dict(zip(("num_heads", "rotary_dim"), attributes, strict=True))
    ]


def _in_order(body: str) -> list[str]:
    """The statements of a body, each after those that it reads."""
    waiting = [part.strip() for part in re.split(r"\s{2,}", body) if part.strip()]
    made = {name.strip() for part in waiting for name in part.split(" = ", 1)[0].split(",")}
    ordered: list[str] = []
    done: set[str] = set()
    while waiting:
        for part in waiting:
            names, call = part.split(" = ", 1)
            reads = set(re.findall(r"\w+", call[call.rindex("(") :]))
            if not (reads & made) - done:
                ordered.append(part)
                done |= {name.strip() for name in names.split(",")}
                waiting.remove(part)
                break
        else:
            raise AssertionError(waiting)
    return ordered


def test_queries_and_keys_share_tables() -> None:
    keys = PLAIN.replace("(x,", "(k,")
    for name in ("x1", "x2", "m", "turned", "a", "b", "y"):
        keys = (
            keys.replace(f"{name} = ", f"k{name} = ")
            .replace(f"({name}", f"(k{name}")
            .replace(f", {name})", f", k{name})")
        )
    result = fused(model(ANGLES + PLAIN + keys, "float[B, H, S, D] y, float[B, H2, S, D] ky"))
    assert check(result, sites=2) == [{"num_heads": n, "rotary_dim": 8} for n in (4, 2)]
    assert result.ops["Cos"] == 1


def test_half_floats_with_angles_in_float32() -> None:
    body = ANGLES.replace("c = Uns", "cw = Uns").replace("s = Uns", "sw = Uns")
    body += "  c = Cast <to = 10> (cw)  s = Cast <to = 10> (sw)  h = Cast <to = 10> (x)"
    body += PLAIN.replace("(x,", "(h,").replace("y = Add", "z = Add") + "  y = Cast <to = 1> (z)"
    assert check(fused(model(body), tolerance=HALF_FLOAT)) == [{"num_heads": 4, "rotary_dim": 8}]


def test_an_old_model_is_converted() -> None:
    result = fused(model(ANGLES + PLAIN, opset=13))
    check(result)
    assert result.model.opset() == 18


def test_inside_of_a_branch() -> None:
    text = f"""agraph (bool on, float[B, 4, S, 8] x, float[B, S, 4] f) => (float[B, 4, S, 8] z) {{
        z = If (on) <
            then_branch = left () => (float[B, 4, S, 8] y) {{ {ANGLES} {PLAIN} }},
            else_branch = right () => (float[B, 4, S, 8] w) {{ w = Neg (x) }}>
    }}"""
    constants = {"i0": np.array([0]), "i1": np.array([1]), "i4": np.array([4]), "end": np.array([2**63 - 1])}
    source = proto(text, 18, last=np.array([-1]), **constants)
    for on in (True, False):
        feeds = {"on": np.array(on), "x": INPUTS["x"], "f": INPUTS["f"]}
        check(fuse(FuseRotary(), source, feeds))


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_any_number_of_tokens(batch: int, tokens: int) -> None:
    source = model(ANGLES + PLAIN)
    feeds = {"x": floats(batch, 4, tokens, 8), "f": floats(batch, tokens, HALF, seed=5)}
    check(fuse(FuseRotary(), source, feeds))


def test_no_transpose_or_reshape_stays_between_a_projection_and_its_rotation() -> None:
    body = "m0 = MatMul (h, w)  h0 = Reshape (m0, split)  x = Transpose <perm = [0, 2, 1, 3]> (h0)" + ANGLES + PLAIN
    body += "  z = Transpose <perm = [0, 2, 1, 3]> (y)  out = Reshape (z, join)"
    constants = {"i0": np.array([0]), "i1": np.array([1]), "i4": np.array([4]), "end": np.array([2**63 - 1])}
    source = proto(
        f"agraph (float[B, S, 16] h, float[B, S, 4] f) => (float[B, S, 32] out) {{ {body} }}",
        18,
        last=np.array([-1]),
        w=floats(16, 32),
        split=np.array([0, 0, 4, 8]),
        join=np.array([0, 0, 32]),
        **constants,
    )
    result = fuse("fuse_rotary, cleanup", source, {"h": floats(2, 3, 16), "f": INPUTS["f"]}, 1e-5)
    assert result.ops == {"MatMul": 1, "Cos": 1, "Sin": 1, "RotaryHalf": 1}
