"""What every fusion must do: the same results in ONNX Runtime, a valid model, and nothing the second time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from block_models import model_of, proto

from onnxslim_llm.ir.model import Model
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.pipeline import Pipeline

__all__ = ["Fused", "floats", "fuse", "proto", "run_all"]

Array = np.ndarray[Any, Any]

#: Float32 sums of at most a few dozen terms around one, in another order: some units of 2^-24.
TOLERANCE = 2e-6


@dataclass
class Fused:
    """A model after a pass.

    Attributes:
        model: The model.
        ops: Its operators; concepts by their plain name.
        sites: What changed.
        reasons: Why other places were left alone, joined.
    """

    model: Model
    ops: Counter[str]
    sites: int
    reasons: str


def floats(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) + 0.25).astype(dtype)


def run_all(source: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs in ONNX Runtime without its optimisations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(source.SerializeToString(), options, ["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feeds)), strict=True))


def fuse(step: Pass | str, source: onnx.ModelProto, feeds: Mapping[str, Array], tolerance: float = TOLERANCE) -> Fused:
    """Run a pass (or a pipeline that ends with it), check what must always hold, and return what came out."""
    pipeline = Pipeline(step if isinstance(step, str) else [step])
    model = model_of(source)
    record = pipeline.run(model)[-1]
    after = model.to_proto()
    onnx.checker.check_model(after)
    expected, actual = run_all(source, feeds), run_all(after, feeds)
    assert list(expected) == list(actual)
    for name, value in expected.items():
        assert value.dtype == actual[name].dtype, name
        assert value.shape == actual[name].shape, name
        np.testing.assert_allclose(actual[name], value, rtol=tolerance, atol=tolerance, err_msg=name)
    again: Change = pipeline.passes[-1].apply(model_of(after), _context())
    assert not again, f"the second time it changed {again.sites}"
    ops = Counter(node.op for graph in model.graphs() for node in graph.nodes)
    return Fused(model, ops, record.changed, "; ".join(skip.reason for skip in record.skipped))


def _context() -> Any:
    from onnxslim_llm.rewrite.context import Context

    return Context()
