"""Small models in ONNX text, run by the executor and by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import parser

from onnxslim_llm.gradients.executor import Executor
from onnxslim_llm.ir.model import Model, from_proto
from onnxslim_llm.runtime.session import open_session

__all__ = ["executor_of", "model_of", "proto_of", "runtime_results"]


def proto_of(body: str, opset: int = 20, **weights: NDArray[Any]) -> onnx.ModelProto:
    """The model of a graph in ONNX text, with initializers."""
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> {body}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


def model_of(body: str, opset: int = 20, **weights: NDArray[Any]) -> Model:
    return from_proto(proto_of(body, opset, **weights))


def executor_of(body: str, opset: int = 20, **weights: NDArray[Any]) -> Executor:
    return Executor(model_of(body, opset, **weights))


def runtime_results(proto: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return dict(open_session(proto, threads=1).run(dict(feeds)))
