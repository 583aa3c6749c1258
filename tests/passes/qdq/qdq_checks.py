"""Quantize small graphs, and look at what came out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from block_models import Array, model_of

from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.passes.qdq.quantize_activations import QuantizeActivations
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import PassRecord, Pipeline
from onnxslim_llm.runtime.session import Session, open_session
from onnxslim_llm.stats.observe import GraphObserver
from onnxslim_llm.targets import Target
from onnxslim_llm.targets.portable import PORTABLE
from onnxslim_llm.targets.qdq_rules import QdqRules
from onnxslim_llm.targets.qdq_tables import WHOLE_GRAPH

INTEGER_PROCESSOR = replace(PORTABLE, name="integer-processor", qdq=WHOLE_GRAPH)


def with_rules(rules: QdqRules | None, name: str = "some-target") -> Target:
    return replace(PORTABLE, name=name, qdq=rules)


def observer(*samples: dict[str, Array]) -> GraphObserver:
    def feeds(session: Session) -> Iterator[dict[str, Array]]:
        yield from samples

    return GraphObserver(feeds)


def quantized(
    source: onnx.ModelProto, *samples: dict[str, Array], target: Target | None = None, **options: Any
) -> tuple[Model, PassRecord, Context]:
    """Run the pass; the result is a valid model."""
    model = model_of(source)
    context = Context(target=target, observer=observer(*samples))
    (record,) = Pipeline([QuantizeActivations(**options)]).run(model, context)
    onnx.checker.check_model(model.to_proto(), full_check=True)
    return model, record, context


def run(model: Model | onnx.ModelProto, feeds: dict[str, Array], optimise: bool = False) -> dict[str, Array]:
    proto = model if isinstance(model, onnx.ModelProto) else model.to_proto()
    return open_session(proto, threads=1, optimise=optimise).run(feeds)


def producer(tensor: gs.Tensor) -> gs.Node:
    (node,) = tensor.inputs
    return node


def node_of(model: Model, op: str, index: int = 0) -> gs.Node:
    return [node for node in model.graph.nodes if node.op == op][index]


def value(tensor: gs.Tensor) -> Array:
    assert isinstance(tensor, gs.Constant), tensor
    return weight_of(tensor).load()


def parameters(dequantize: gs.Node) -> tuple[float, int]:
    """Scale and zero point of a DequantizeLinear node with one scale."""
    assert dequantize.op == "DequantizeLinear", dequantize
    return float(value(dequantize.inputs[1])), int(value(dequantize.inputs[2]))


def reason(record: PassRecord, where: str) -> str:
    return next(skip.reason for skip in record.skipped if skip.where == where)


def half_integer_nodes(model: Model, ops: set[str]) -> list[str]:
    """Nodes of these operators that read codes and floats, or read codes and do not round their result."""
    found = []
    for node in model.graph.nodes:
        if node.op not in ops:
            continue
        floats = [t for t in node.inputs if not t.is_empty() and t.dtype in (np.float32, np.float16)]
        read = [bool(t.inputs) and t.inputs[0].op == "DequantizeLinear" for t in floats]
        rounded = [any(user.op == "QuantizeLinear" for user in t.outputs) for t in node.outputs]
        if any(read) and not (all(read) and all(rounded)):
            found.append(node.name or node.outputs[0].name)
    return found
