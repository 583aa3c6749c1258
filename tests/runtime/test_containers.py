"""Results that are sequences and maps: the probabilities of a converted classifier are compared, too."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxslim_llm.runtime.containers import flat_values
from onnxslim_llm.runtime.session import open_session
from onnxslim_llm.verify.check import Verifier

WEIGHTS = [1.0, -2.0, 0.5, 0.25]


def classifier(weights: list[float]) -> onnx.ModelProto:
    """Two classes of two features, with the probabilities as a map for each row."""
    score = helper.make_node(
        "LinearClassifier",
        ["x"],
        ["label", "p"],
        domain="ai.onnx.ml",
        coefficients=weights,
        intercepts=[0.0, 0.0],
        classlabels_ints=[3, 7],
        multi_class=1,
        post_transform="SOFTMAX",
    )
    named = helper.make_node("ZipMap", ["p"], ["z"], domain="ai.onnx.ml", classlabels_int64s=[3, 7])
    probabilities = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    graph = helper.make_graph(
        [score, named],
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [
            helper.make_tensor_value_info("label", TensorProto.INT64, ["n"]),
            helper.make_value_info("z", helper.make_sequence_type_proto(probabilities)),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def test_values_of_a_sequence_of_maps() -> None:
    x = np.array([[1, 2], [3, -1], [0, 0]], np.float32)
    found = open_session(classifier(WEIGHTS)).run({"x": x})
    scores = x @ np.array(WEIGHTS, np.float32).reshape(2, 2).T
    expected = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    np.testing.assert_allclose(found["z"].reshape(3, 2), expected, rtol=1e-5)
    assert found["label"].tolist() == [(3, 7)[i] for i in expected.argmax(1)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([np.ones((2, 2)), np.zeros(1)], [1, 1, 1, 1, 0]),
        ({"b": 2.0, "a": 1.0}, [1, 2]),
        ([{2: 0.5, 1: 0.25}], [0.25, 0.5]),
        ([], []),
        (None, []),
    ],
)
def test_values_of_other_kinds(value: object, expected: list[float]) -> None:
    assert flat_values(value).tolist() == expected


def test_a_difference_that_only_a_map_shows_is_measured() -> None:
    """Twice the weights have the same labels."""
    verifier = Verifier(classifier(WEIGHTS))
    same = verifier.check(open_session(classifier(WEIGHTS)), "lossless")
    assert same.comparison.total.max_abs == 0
    assert same.ok
    other = verifier.check(open_session(classifier([2 * weight for weight in WEIGHTS])), "lossless")
    assert other.comparison.outputs["label"].max_abs == 0
    assert other.comparison.outputs["z"].max_abs > 0.01
    assert not other.ok
