"""Models that consist of one concept call, and what lowering makes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from fusion_checks import run_all
from onnx import helper

from onnxslim_llm.concepts.concept import Concept
from onnxslim_llm.ir.model import Model, from_proto
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import PassRecord, Pipeline
from onnxslim_llm.targets import get_target

Array = np.ndarray[Any, Any]


def call_model(
    concept: Concept,
    feeds: Mapping[str, Array],
    attributes: Mapping[str, Any],
    shapes: Mapping[str, list[int | str | None]],
    opset: int = 18,
) -> Model:
    """A model of one call with one output Y of the type of the first input."""
    model = from_proto(helper.make_model(helper.make_graph([], "g", [], []), ir_version=10))
    model.set_opset("", opset)
    inputs = [gs.Variable(name, value.dtype, shapes[name]) for name, value in feeds.items()]
    output = gs.Variable("Y", inputs[0].dtype)
    model.graph.inputs, model.graph.outputs = inputs, [output]
    model.graph.nodes.append(concept.call(model, "call", inputs, [output], attributes))
    return model


def lower(model: Model, steps: str, target: str) -> tuple[Counter[str], PassRecord]:
    """Run passes in place; return the operators that are left and the account of the first pass."""
    goal = get_target(target)
    records = Pipeline(steps).run(model, Context(target=goal))
    assert goal.lint(model) == []
    return Counter(node.op for graph in model.graphs() for node in graph.nodes), records[0]


def assert_same_results(before: Model, after: Model, feeds: Mapping[str, Array], tolerance: float) -> None:
    """Compare all outputs in ONNX Runtime, relative to the largest number."""
    expected, actual = run_all(before.to_proto(), feeds), run_all(after.to_proto(), feeds)
    assert list(expected) == list(actual)
    for name, value in expected.items():
        assert value.shape == actual[name].shape
        assert value.dtype == actual[name].dtype
        difference = np.abs(value.astype(np.float64) - actual[name]).max(initial=0.0)
        assert difference <= tolerance * max(1.0, np.abs(value).max(initial=0.0)), name
