from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import Model, from_proto
from onnxslim_llm.rewrite.pipeline import PassRecord, Pipeline
from onnxslim_llm.runtime.session import open_session


def cached() -> Model:
    body = """<ir_version: 10, opset_import: ["" : 21]>
    g (int64[batch, seq] ids, float[batch, 2, past, 4] old) => (float[batch, 2, total, 4] present)
    <int64[1] one = {1}, int64[1] last = {-1}, int64[1] zero = {0}, int64[1] two = {2},
     int64[1] four = {4}>
    {
        rows = Unsqueeze (ids, one)
        wide = Unsqueeze (rows, last)
        new0 = Cast <to = 1> (wide)
        shape = Shape (ids)
        b = Gather (shape, zero)
        s = Gather (shape, one)
        target = Concat <axis = 0> (b, two, s, four)
        new = Expand (new0, target)
        present = Concat <axis = 2> (old, new)
    }"""
    proto = onnx.parser.parse_model(body)
    proto.graph.output[0].type.tensor_type.shape.dim[2].dim_param = "past + seq"
    return from_proto(proto)


def fixed(model: Model, sizes: str, rest: str = "") -> PassRecord:
    return Pipeline(f'fix_shapes{{sizes="{sizes}"}}{rest}').run(model)[0]


def test_sums_of_sizes_become_numbers() -> None:
    model = cached()
    fixed(model, "batch=1,seq=3,past=5", ", cleanup")
    assert [list(t.shape) for t in model.graph.inputs] == [[1, 3], [1, 2, 5, 4]]
    assert list(model.graph.outputs[0].shape) == [1, 2, 8, 4]
    assert "Shape" not in model.census()


def test_an_input_without_elements_goes() -> None:
    model, ids = cached(), np.arange(3, dtype=np.int64)[None]
    expected = open_session(model.to_proto()).run({"ids": ids, "old": np.zeros((1, 2, 0, 4), np.float32)})
    record = fixed(model, "batch=1,seq=3,past=0", ", cleanup")
    assert record.detail["inputs without elements"] == ["old"]
    assert [t.name for t in model.graph.inputs] == ["ids"]
    assert "Concat" not in model.census()
    got = open_session(model.to_proto()).run({"ids": ids})
    np.testing.assert_array_equal(got["present"], expected["present"])


def test_beginnings_of_names() -> None:
    model = cached()
    fixed(model, "ba=1,se=3,pas=2")
    assert list(model.graph.inputs[0].shape) == [1, 3]


def test_a_dimension_without_a_name() -> None:
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[?, 4] x) => (float[?, 4] y) { y = Relu (x) }'
    model = from_proto(onnx.parser.parse_model(text))
    fixed(model, "x.0=7")
    assert list(model.graph.inputs[0].shape) == [7, 4]
    assert list(model.graph.outputs[0].shape) == [7, 4]


def test_what_is_not_named_stays_symbolic() -> None:
    record = fixed(model := cached(), "batch=1,past=2")
    assert ("ids", "no size is given for 'seq'") in [(s.where, s.reason) for s in record.skipped]
    assert model.graph.inputs[0].shape[1] == "seq"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("lines=3", "no dimension of an input is called 'lines'"),
        ("seq", "'seq' is no size"),
        ("seq=-1", "'seq=-1' is no size"),
        ("seq=1,seq=2", "'seq' has the sizes 1 and 2"),
        ("batch=1,seq=0,past=0", "has no elements with these sizes"),
    ],
)
def test_bad_sizes(sizes: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        fixed(cached(), sizes)
    assert caught.value.where
    assert caught.value.todo


def test_a_name_that_begins_two() -> None:
    head = '<ir_version: 10, opset_import: ["" : 21]>'
    text = f"{head} g (float[size_a, size_b] x) => (float[size_a, size_b] y) {{ y = Relu (x) }}"
    with pytest.raises(UsageError, match="'size' may be size_a or size_b"):
        fixed(from_proto(onnx.parser.parse_model(text)), "size=3")


def test_sizes_that_are_fixed_stay() -> None:
    model = cached()
    fixed(model, "batch=1,seq=3,past=5")
    assert fixed(model, "batch=2").changed == 0
