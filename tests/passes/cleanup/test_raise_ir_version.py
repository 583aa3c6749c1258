from __future__ import annotations

import numpy as np
import onnx
from cleanup_graphs import assert_same_results, feeds, graph, model_of, ops

from onnxslim_llm.ir.model import from_proto
from onnxslim_llm.passes.cleanup.cleanup import Cleanup
from onnxslim_llm.passes.cleanup.raise_ir_version import RaiseIrVersion
from onnxslim_llm.rewrite.context import Context

TEXT = """
    g (float[2] x, float[2] w) => (float[2] y) {
        c = Constant <value = float {1.0}> ()  a = Add (w, c)  y = Add (x, a)
    }"""
W = np.array([1.0, 2.0], np.float32)


def test_old_models_are_cleaned_up_and_stay_valid() -> None:
    proto = graph(TEXT, 8, 3, w=W)
    model = model_of(proto)
    assert Cleanup().apply(model, Context())
    after = model.to_proto()
    onnx.checker.check_model(after, full_check=True)
    assert (after.ir_version, [v.name for v in after.graph.input]) == (4, ["x"])
    assert ops(after) == {"Add": 1}
    assert_same_results(proto, after, feeds(proto))
    assert not Cleanup().apply(from_proto(after), Context())


def test_newer_models_are_left() -> None:
    proto = graph(TEXT, 8, 4, w=W)
    model = model_of(proto)
    assert not RaiseIrVersion().apply(model, Context())
    assert [v.name for v in model.to_proto().graph.input] == ["x", "w"]
