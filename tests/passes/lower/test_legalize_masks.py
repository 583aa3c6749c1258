from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import Model, from_proto
from onnxslim_llm.rewrite.pipeline import PassRecord, Pipeline
from onnxslim_llm.runtime.session import open_session

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
#: Softmax of the same scores, hidden keys at e^-100 instead of 0: a rounding of float32.
TOLERANCE = 2**-23
RNG = np.random.default_rng(0)
SCORES = RNG.standard_normal((1, 2, 4, 4)).astype(np.float32)
MASK = np.array([[1, 1, 1, 0]], np.int64)


def legalized(text: str, steps: str = "legalize_masks") -> tuple[Model, Model, PassRecord]:
    source = from_proto(onnx.parser.parse_model(f"{HEAD} {text}"))
    model = source.copy()
    record = Pipeline(steps).run(model)[0]
    return source, model, record


def assert_equal_results(source: Model, model: Model, feeds: dict[str, Any]) -> None:
    before, after = (open_session(m.to_proto(), optimise=False).run(feeds) for m in (source, model))
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, atol=TOLERANCE, rtol=0)


def smallest(model: Model) -> float:
    values = [np.asarray(t.values).min() for t in model.constants() if np.asarray(t.values).dtype.kind == "f"]
    return float(min(values))


SELECT = """g (float[1,2,4,4] scores, int64[1,4] mask) => (float[1,2,4,4] y)
    <int64[2] axes = {1, 2}, float low = {-3.4e38}, float none = {0}, int64 zero = {0}> {
    seen = Greater (mask, zero)
    wide = Unsqueeze (seen, axes)
    hidden = Where (wide, scores, low)
    y = Softmax <axis = -1> (hidden)
}"""


def test_a_condition_becomes_a_bias() -> None:
    source, model, record = legalized(SELECT)
    assert record.changed == 1
    assert "Where" not in model.census()
    assert smallest(model) == -100
    assert_equal_results(source, model, {"scores": SCORES, "mask": MASK})


def test_several_masks_are_merged_and_shared() -> None:
    text = """g (float[1,2,4,4] scores, int64[1,4] mask) => (float[1,2,4,4] y, float[1,2,4,4] z)
    <int64[2] axes = {1, 2}, float low = {-3.4e38}, float one = {1}, float big = {-3.4e38},
     bool[4,4] causal = {1,0,0,0, 1,1,0,0, 1,1,1,0, 1,1,1,1}> {
        number = Cast <to = 1> (mask)
        wide = Unsqueeze (number, axes)
        complement = Sub (one, wide)
        padding = Mul (complement, big)
        a = Where (causal, scores, low)
        b = Add (a, padding)
        y = Softmax <axis = -1> (b)
        c = Where (causal, scores, low)
        d = Add (c, padding)
        z = Softmax <axis = -1> (d)
    }"""
    source, model, record = legalized(text)
    assert record.changed == 2
    assert model.census()["Min"] == 1
    assert model.census()["Add"] == 2
    assert smallest(model) == -100
    assert_equal_results(source, model, {"scores": SCORES, "mask": MASK})


def test_a_constant_mask_is_bounded() -> None:
    text = """g (float[1,1,2,2] scores) => (float[1,1,2,2] y) <float[2,2] mask = {0, -3.4e38, 0, 0}> {
        a = Add (scores, mask)
        y = Softmax <axis = -1> (a)
    }"""
    source, model, _ = legalized(text)
    assert smallest(model) == -100
    assert_equal_results(source, model, {"scores": SCORES[:, :1, :2, :2]})


def test_the_guard_of_empty_rows_goes() -> None:
    text = SELECT.replace(
        "y = Softmax <axis = -1> (hidden)",
        """
        weights = Softmax <axis = -1> (hidden)
        bad = IsNaN (weights)
        kept = Where (bad, none, weights)
        y = Relu (kept)""",
    ).replace("-3.4e38", "-1e38")
    source, model, _ = legalized(text)
    assert set(model.census()) == {"Greater", "Cast", "Gather", "Unsqueeze", "Add", "Softmax", "Relu"}
    assert_equal_results(source, model, {"scores": SCORES, "mask": MASK})


def test_a_bias_of_the_model_stays() -> None:
    text = """g (float[1,1,2,2] scores) => (float[1,1,2,2] y) <float[2,2] slope = {0, -1, -2, 0}> {
        a = Add (scores, slope)
        y = Softmax <axis = -1> (a)
    }"""
    _, model, record = legalized(text)
    assert record.changed == 0
    assert smallest(model) == -2


def test_scores_that_something_else_reads_stay() -> None:
    text = SELECT.replace("(float[1,2,4,4] y)", "(float[1,2,4,4] y, float[1,2,4,4] hidden)")
    _, model, record = legalized(text)
    assert record.changed == 0
    assert [s.reason for s in record.skipped] == ["something else reads 'hidden'"]
    assert model.census()["Where"] == 1


@pytest.mark.parametrize("lowest", [0, 5, -1e4])
def test_bad_options(lowest: float) -> None:
    with pytest.raises(UsageError, match="lowest is"):
        Pipeline(f"legalize_masks{{lowest={lowest}}}")


def test_look_ups_lose_their_guard() -> None:
    text = """g (float[8,2] table, int64[1,3] at, int64[1,3] other) => (float[1,3,2] y, int64[1,3] z)
    <int64 zero = {0}, int64 bound = {8}> {
        negative = Less (at, zero)
        safe = Where (negative, bound, at)
        y = Gather (table, safe)
        less = Less (other, zero)
        z = Where (less, bound, other)
    }"""
    source, model, record = legalized(text, "legalize_indices")
    assert record.changed == 1
    assert model.census() == {"Gather": 1, "Less": 1, "Where": 1}
    feeds = {"table": SCORES.reshape(-1)[:16].reshape(8, 2), "at": MASK[:, :3], "other": MASK[:, :3]}
    assert_equal_results(source, model, feeds)


def test_means_become_products() -> None:
    text = """g (float[1,2,4,4] scores) => (float[1,2,4,1] y, float[1,2,1,4] z)
    <int64[1] last = {-1}, int64[1] rows = {2}> {
        y = ReduceMean <keepdims = 1> (scores, last)
        z = ReduceMean <keepdims = 1> (scores, rows)
    }"""
    source, model, record = legalized(text, "legalize_means")
    assert record.changed == 1
    assert model.census() == {"MatMul": 1, "ReduceMean": 1}
    assert_equal_results(source, model, {"scores": SCORES})


def test_means_of_unknown_size_stay() -> None:
    text = """g (float[n,m] x) => (float[n,1] y) <int64[1] last = {-1}> { y = ReduceMean <keepdims = 1> (x, last) }"""
    _, model, record = legalized(text, "legalize_means")
    assert model.census() == {"ReduceMean": 1}
    assert "the size of the axis is not known" in record.skipped[0].reason


def test_inputs_get_values() -> None:
    text = """g (int64[1,4] ids, int64[1,4] mask, int64[1,4] at) => (int64[1,4] y) {
        a = Mul (ids, mask)
        y = Add (a, at)
    }"""
    _, model, record = legalized(text, 'fix_inputs{values="mask=1,at=range"}')
    assert record.changed == 2
    assert [t.name for t in model.graph.inputs] == ["ids"]
    got = open_session(model.to_proto()).run({"ids": np.full((1, 4), 5, np.int64)})
    np.testing.assert_array_equal(got["y"], [[5, 6, 7, 8]])


def test_inputs_that_cannot_get_values() -> None:
    text = """g (int64[n] free, int64[2] both) => (int64[n] y, int64[2] both) { y = Neg (free) }"""
    _, _, record = legalized(text, 'fix_inputs{values="free=1,both=1"}')
    assert {s.reason for s in record.skipped} == {"its size is not fixed", "it is an output, too"}
    with pytest.raises(UsageError, match="there is no input 'mask'"):
        legalized(text, 'fix_inputs{values="mask=1"}')
    with pytest.raises(UsageError, match="'mask=x' is no value"):
        Pipeline('fix_inputs{values="mask=x"}')
