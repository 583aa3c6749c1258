"""Tables of cosines and sines that are looked up by position."""
# ruff: noqa: E501 (one graph a line)

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from fusion_checks import floats, run_all
from rotary_models import PLAIN, model

from onnxslim_llm.concepts.concept import calls
from onnxslim_llm.concepts.rotary import ROTARY
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import Model, from_proto
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.passes.fuse.fold_rotary_tables import FoldRotaryTables
from onnxslim_llm.rewrite.pipeline import Pipeline

FREQUENCIES = np.array([1, 0.1, 0.01, 0.001], np.float32)
COUNT = 16
#: Cosines of numpy and of ONNX Runtime differ by a unit in the last place, times products of numbers up to four.
TOLERANCE = 4 * 2.0**-23
ALL = "positions=16, max_share=1000.0"

TAIL = (
    "both = Concat <axis = -1> (f1, f1)  c0 = Cos (both)  s0 = Sin (both)  c = Unsqueeze (c0, i1)  s = Unsqueeze (s0, i1)"
    + PLAIN
)
TURNED = (
    "p1 = Unsqueeze (p, i1)  p2 = Cast <to = 1> (p1)  f0 = MatMul (rows, p2)  f1 = Transpose <perm = [0, 2, 1]> (f0)  "
)
CONSTANTS = {
    "rows": FREQUENCIES.reshape(1, 4, 1),
    "inv": FREQUENCIES,
    "cache": floats(COUNT, 8),
    "batched": floats(1, COUNT, 8),
}


def build(body: str, **more: Any) -> onnx.ModelProto:
    return model(body, **CONSTANTS, **more)


def fold(source: onnx.ModelProto, options: str = ALL) -> tuple[Model, str, int]:
    """The model with tables looked up, the reasons where not, and the number of sites."""
    copy = onnx.ModelProto()
    copy.CopyFrom(source)
    folded = from_proto(copy)
    records = Pipeline(f"fuse_rotary, cleanup, fold_rotary_tables{{{options}}}, cleanup").run(folded)
    assert records[0].changed
    record = next(r for r in records if r.name == "fold_rotary_tables")
    assert not FoldRotaryTables(positions=COUNT, max_share=1000.0).apply(folded, None), (
        "the second time nothing changes"
    )  # type: ignore[arg-type]
    return folded, "; ".join(skip.reason for skip in record.skipped), record.changed


def feeds(source: onnx.ModelProto, positions: list[list[int]]) -> dict[str, np.ndarray[Any, Any]]:
    batch, tokens = np.shape(positions)
    known = {"x": floats(batch, 4, tokens, 8), "p": np.array(positions), "f": floats(batch, tokens, 4, seed=3)}
    return {value.name: known[value.name] for value in source.graph.input}


def assert_same(source: onnx.ModelProto, folded: Model) -> None:
    for positions in ([[0, 1, 2], [4, 5, 3]], [[COUNT - 1]], [[7, 0, 15, 3, 3]] * 3):
        given = feeds(source, positions)
        expected, actual = run_all(source, given), run_all(folded.to_proto(), given)
        for name, value in expected.items():
            np.testing.assert_allclose(actual[name], value, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)


def ops(folded: Model) -> Counter[str]:
    return Counter(node.op for node in folded.graph.nodes)


def tables(folded: Model) -> list[tuple[int, ...]]:
    [(_, node), *_] = calls(folded, *ROTARY.values())
    return [weight_of(t.inputs[0].inputs[0]).shape for t in node.inputs[1:]]


#: Ways from positions to angles f1 [B, S, 4].
COMPUTED = {
    "matmul of frequencies": TURNED,
    "product": "p1 = Unsqueeze (p, last)  p2 = Cast <to = 1> (p1)  f1 = Mul (p2, inv)  ",
    "expanded frequencies": (
        "shape = Shape (p)  many = Gather (shape, i0)  target = Concat <axis = 0> (many, i1, i1)  e = Expand (rows, target)  "
        "p1 = Unsqueeze (p, i1)  p2 = Cast <to = 1> (p1)  f0 = MatMul (e, p2)  f1 = Transpose <perm = [0, 2, 1]> (f0)  "
    ),
    "positions halved": "p0 = Cast <to = 1> (p)  p1 = Unsqueeze (p0, last)  p2 = Mul (p1, half)  f1 = Mul (p2, inv)  ",
}


@pytest.mark.parametrize("body", COMPUTED.values(), ids=COMPUTED.keys())
def test_angles_of_positions(body: str) -> None:
    source = build(body + TAIL, half=np.array(0.5, np.float32))
    folded, reasons, sites = fold(source)
    assert (sites, reasons) == (1, "")
    assert tables(folded) == [(COUNT, 4)] * 2
    assert not ops(folded)["Cos"] + ops(folded)["MatMul"] + ops(folded)["Cast"]
    assert_same(source, folded)


@pytest.mark.parametrize("position", [-1, -COUNT, COUNT, 10**6])
def test_a_position_that_is_not_in_the_table_is_an_error(position: int) -> None:
    source = build(TURNED + TAIL)
    folded, _, _ = fold(source)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="out of"):
        run_all(folded.to_proto(), feeds(source, [[0, position, 1]]))


def test_a_range_needs_no_guard() -> None:
    body = "shape = Shape (x)  n = Gather (shape, n2)  p = Range (n0, n, n1)  p0 = Cast <to = 1> (p)  p1 = Unsqueeze (p0, last)  f0 = Mul (p1, inv)  f1 = Unsqueeze (f0, i0)  "
    source = build(
        (body + TAIL).replace("Range (n0", "Range (zero").replace("(p)", "(q)").replace("p = R", "q = R"),
        zero=np.array(0),
    )
    folded, _, sites = fold(source)
    assert sites == 1
    assert not ops(folded)["Where"]
    assert_same(source, folded)


def test_a_table_in_the_graph_says_how_many_positions_there_are() -> None:
    """GPT-J: rows picked from a table for each element, and cut in two."""
    body = "p1 = Unsqueeze (p, last)  p2 = Tile (p1, eights)  shape = Shape (p)  many = Gather (shape, i0)  copies = Concat <axis = 0> (many, i1, i1)  all = Tile (batched, copies)  row = GatherElements <axis = 1> (all, p2)  "
    body += (
        "s1, c1 = Split <axis = -1> (row, fours)  c0 = Concat <axis = -1> (c1, c1)  s0 = Concat <axis = -1> (s1, s1)  c = Unsqueeze (c0, i1)  s = Unsqueeze (s0, i1)"
        + PLAIN
    )
    source = build(body, eights=np.array([1, 1, 8]))
    folded, reasons, sites = fold(source, "max_share=0.0")  # the new tables replace the old one
    assert (sites, reasons) == (1, "")
    assert tables(folded) == [(COUNT, 4)] * 2
    assert not ops(folded)["GatherElements"] + ops(folded)["Tile"] + ops(folded)["Where"]
    assert_same(source, folded)


def test_layers_share_the_folded_tables() -> None:
    again = PLAIN.replace("(x,", "(w,")
    for name in ("x1", "x2", "m", "turned", "a", "b", "y"):
        again = (
            again.replace(f"{name} = ", f"w{name} = ")
            .replace(f"({name}", f"(w{name}")
            .replace(f", {name})", f", w{name})")
        )
    source = build(TURNED + TAIL.replace(PLAIN, PLAIN.replace("y = ", "w = ")) + again.replace("wy = ", "y = "))
    folded, _, sites = fold(source)
    assert sites == 1
    assert len(list(calls(folded, *ROTARY.values()))) == 2
    assert ops(folded)["Gather"] == 2
    assert_same(source, folded)


LEFT = {
    "the number of positions is not known": (TURNED + TAIL, "max_share=1000.0", "number of positions is not known"),
    "too large": (TURNED + TAIL, "positions=100000", "more than 0.01 of the weights"),
    "the length of the text matters": (
        "q = Cast <to = 1> (p)  longest = ReduceMax (q)  p0 = Div (q, longest)  p1 = Unsqueeze (p0, last)  f1 = Mul (p1, inv)  "
        + TAIL,
        ALL,
        "ReduceMax may mix positions",
    ),
    "positions of other tokens matter": (
        "q = Cast <to = 1> (p)  p0 = CumSum (q, n1)  p1 = Unsqueeze (p0, last)  f1 = Mul (p1, inv)  " + TAIL,
        ALL,
        "CumSum may mix positions",
    ),
    "angles given": (TAIL.replace("f1", "f"), ALL, "not computed from positions alone"),
    "positions are shifted": (
        "p0 = Unsqueeze (p, i1)  p1 = Add (p0, i1)  p2 = Squeeze (p1, i1)  c0 = Gather (cache, p2)  s0 = Sin (c0)  cw, cv = Split <axis = -1> (c0, fours)  sw, sv = Split <axis = -1> (s0, fours)  "
        "cu = Concat <axis = -1> (cw, cw)  su = Concat <axis = -1> (sw, sw)  c = Unsqueeze (cu, i1)  s = Unsqueeze (su, i1)"
        + PLAIN,
        ALL,
        "positions are changed before they index a table",
    ),
    "positions are clipped": (
        "p0 = Unsqueeze (p, i1)  p1 = Min (p0, i8)  p2 = Squeeze (p1, i1)  c0 = Gather (half1, p2)  s0 = Sin (c0)  "
        "cu = Concat <axis = -1> (c0, c0)  su = Concat <axis = -1> (s0, s0)  c = Unsqueeze (cu, i1)  s = Unsqueeze (su, i1)"
        + PLAIN,
        ALL,
        "positions are changed before they index a table",
    ),
    "looked up already": (
        "c0 = Gather (half1, p)  s0 = Gather (half2, p)  c1 = Concat <axis = -1> (c0, c0)  s1 = Concat <axis = -1> (s0, s0)  c = Unsqueeze (c1, i1)  s = Unsqueeze (s1, i1)"
        + PLAIN,
        ALL,
        "looked up in a constant already",
    ),
}


@pytest.mark.parametrize(("body", "options", "reason"), LEFT.values(), ids=LEFT.keys())
def test_left_alone(body: str, options: str, reason: str) -> None:
    source = build(body, half1=floats(COUNT, 4), half2=floats(COUNT, 4, seed=1))
    folded, reasons, sites = fold_once(source, options)
    assert sites == 0
    assert reason in reasons
    assert_same_where_defined(source, folded)


def fold_once(source: onnx.ModelProto, options: str) -> tuple[Model, str, int]:
    copy = onnx.ModelProto()
    copy.CopyFrom(source)
    folded = from_proto(copy)
    records = Pipeline(f"fuse_rotary, cleanup, fold_rotary_tables{{{options}}}").run(folded)
    return folded, "; ".join(skip.reason for skip in records[-1].skipped), records[-1].changed


def assert_same_where_defined(source: onnx.ModelProto, folded: Model) -> None:
    given = feeds(source, [[3, 1, 2]])
    np.testing.assert_allclose(
        run_all(folded.to_proto(), given)["y"], run_all(source, given)["y"], rtol=TOLERANCE, atol=TOLERANCE
    )


def test_options() -> None:
    with pytest.raises(UsageError, match="positions"):
        FoldRotaryTables(positions=-1)
    with pytest.raises(UsageError, match="max_share"):
        FoldRotaryTables(max_share=-1.0)
