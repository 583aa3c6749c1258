from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from onnxslim_llm.concepts.concept import (
    DOMAIN,
    Concept,
    calls,
    drop_unused_functions,
    follow_opset,
    inline_call,
    replace_nodes,
)
from onnxslim_llm.errors import CompilerBug
from onnxslim_llm.ir.model import Model, from_proto

#: y = (a + b) * factor, with an optional clip.
SCALED_SUM = Concept(
    "ScaledSum",
    """<factor> (a, b, low) => (y) {
        f = Constant <value_float: float = @factor> ()
        s = Add (a, b)
        c = Clip (s, low)
        y = Mul (c, f)
    }""",
    min_opset=13,
)
FEEDS = {"a": np.array([1.0, -4.0], np.float32), "b": np.array([2.0, 1.0], np.float32)}


def model_with_call(low: float | None = None, opset: int = 21) -> Model:
    """`y = Add(a, b)` with the Add replaced by a call."""
    head = f'<ir_version: 10, opset_import: ["" : {opset}]>'
    text = f"{head} g (float[2] a, float[2] b) => (float[2] y) {{ y = Add (a, b) }}"
    model = from_proto(onnx.parser.parse_model(text))
    node = model.graph.nodes[0]
    inputs, outputs = list(node.inputs), list(node.outputs)
    node.inputs.clear()
    node.outputs.clear()
    bound = None if low is None else gs.Constant("low", np.array(low, np.float32))
    call = SCALED_SUM.call(model, "scaled", [*inputs, bound], outputs, {"factor": 0.5})
    replace_nodes(model, {id(node): [call]})
    return model


def results(model: Model) -> list[np.ndarray]:
    """What ONNX Runtime and the standard's evaluator compute."""
    proto = model.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return [session.run(None, FEEDS)[0], ReferenceEvaluator(proto).run(None, FEEDS)[0]]


@pytest.mark.parametrize(("low", "expected"), [(None, [1.5, -1.5]), (0.0, [1.5, 0.0])])
def test_a_model_with_a_call_runs_everywhere(low: float | None, expected: list[float]) -> None:
    for result in results(model_with_call(low)):
        np.testing.assert_array_equal(result, np.array(expected, np.float32))


def test_calls_are_found() -> None:
    model = model_with_call()
    ((graph, node),) = calls(model, SCALED_SUM)
    assert graph is model.graph
    assert SCALED_SUM.is_call(node)
    assert not list(calls(model, Concept("Other", "", 1)))
    assert model.opset(DOMAIN) == 1


def test_a_function_is_defined_once() -> None:
    model = model_with_call()
    SCALED_SUM.call(model, "again", [], [], {"factor": 1.0})
    assert [function.name for function in model.functions] == ["ScaledSum"]


@pytest.mark.parametrize("low", [None, 0.0])
def test_inlining_gives_the_same_results(low: float | None) -> None:
    model = model_with_call(low)
    before = results(model)
    ((_, node),) = calls(model)
    body = inline_call(model, node)
    replace_nodes(model, {id(node): body})
    assert drop_unused_functions(model) == ["ScaledSum"]
    assert model.opset(DOMAIN) is None
    assert model.census() == {"Constant": 1, "Add": 1, "Clip": 1, "Mul": 1}
    assert body[0].attrs["value_float"] == 0.5
    if low is None:
        assert len(body[2].inputs) == 1  # an input that is left out stays out
    for result, expected in zip(results(model), before, strict=True):
        np.testing.assert_array_equal(result, expected)


def test_functions_with_calls_stay() -> None:
    model = model_with_call()
    assert drop_unused_functions(model) == []
    assert model.opset(DOMAIN) == 1


def test_functions_follow_the_models_opset() -> None:
    model = model_with_call()
    model.set_opset("", 22)
    follow_opset(model)
    assert [item.version for item in model.functions[0].import_domains] == [22]
    results(model)


def test_a_model_that_is_too_old_is_a_bug_of_the_caller() -> None:
    with pytest.raises(CompilerBug, match="needs opset 13, the model has 11"):
        model_with_call(opset=11)


def test_inlining_what_is_no_function() -> None:
    model = model_with_call()
    with pytest.raises(CompilerBug, match="no function"):
        inline_call(model, gs.Node("Nothing", "n", domain=DOMAIN))
