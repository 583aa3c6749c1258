"""Models in ONNX text for the tests of rules and the matcher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import parser

from onnxslim_llm.ir.model import Model, from_proto
from onnxslim_llm.rewrite.engine import apply_rules, graph_output_ids
from onnxslim_llm.rewrite.matcher import Match, Matcher
from onnxslim_llm.rewrite.passes import Change
from onnxslim_llm.rewrite.rule import Rule

#: The rules under test move values without computing on them, or compute the same thing in float32.
RTOL = 1e-6


def model(text: str, opset: int = 18) -> Model:
    text = text.strip()
    header = "" if text.startswith("<") else f'<ir_version: 8, opset_import: ["" : {opset}]>\n'
    proto = parser.parse_model(header + text)
    onnx.checker.check_model(proto, full_check=True)
    return from_proto(proto)


def matcher(of: Model) -> Matcher:
    return Matcher(of.opset, graph_output_ids(of))


def find(rule: Rule, of: Model, node: int = -1) -> tuple[Match | None, Matcher]:
    """Match `rule` at a node of the top graph."""
    search = matcher(of)
    return search.find(rule.outputs, of.graph.nodes[node], rule.keep_shared), search


def ops(of: Model) -> list[str]:
    return [node.op for graph in of.graphs() for node in graph.nodes]


def run(of: Model, feeds: Mapping[str, Any]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(of.to_proto().SerializeToString(), options, ["CPUExecutionProvider"])
    results: list[Any] = session.run(None, dict(feeds))
    return results


def rewrite(of: Model, rules: Sequence[Rule], feeds: Mapping[str, Any]) -> Change:
    """Apply rules in place, and check that the model is valid, computes the same, and that they came to an end."""
    before = run(of, feeds)
    change = apply_rules(of, rules)
    onnx.checker.check_model(of.to_proto(), full_check=True)
    for expected, actual in zip(before, run(of, feeds), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=RTOL)
    assert not apply_rules(of, rules)
    return change
