"""Constant nodes become initializers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.ir.proto.skeleton import GraphSkeleton, skeleton_of
from onnxslim_llm.ir.weights import constant, weight_of
from onnxslim_llm.rewrite.edit import detach, redirect
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["LiftConstants"]

_NUMBERS = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}


@dataclass(frozen=True)
class LiftConstants(Pass):
    """Turn Constant nodes into initializers of their graph, under the name of their output.

    Before:
        agraph (float[N] x) => (float[N] y) {
            one = Constant <value = float {1.0}> ()
            y = Add (x, one)
        }

    After:
        agraph (float[N] x) => (float[N] y)
        <float one = {1.0}>
        {
            y = Add (x, one)
        }

    Skips when:
        - the constant is itself an output of the graph
        - it holds strings or a sparse tensor
        - it is in the body of a model-local function, which cannot have initializers
    """

    name: ClassVar[str] = "lift_constants"
    group: ClassVar[str] = "cleanup"

    def apply(self, model: Model, context: Context) -> Change:
        """Lift every Constant node of the top graph and its subgraphs."""
        change = Change()
        outputs = graph_output_ids(model)
        for graph in model.graphs():
            kept = []
            skeleton = skeleton_of(graph, GraphSkeleton)
            for node in graph.nodes:
                if node.op != "Constant" or normal_domain(node.domain) != "" or not node.outputs:
                    kept.append(node)
                    continue
                output = node.outputs[0]
                lifted = _content(node)
                if lifted is None:
                    change.skip(output.name, "it holds strings or a sparse tensor")
                elif id(output) in outputs:
                    change.skip(output.name, "it is an output of the graph")
                else:
                    redirect(output, lifted)
                    detach(node)
                    if skeleton is not None:
                        # Named here, it stays one tensor even if only the branches of an If read it.
                        skeleton.initializers.append(lifted)
                    change.sites.append(output.name)
                    continue
                kept.append(node)
            graph.nodes[:] = kept
        return change


def _content(node: gs.Node) -> gs.Constant | None:
    name = node.outputs[0].name
    for attribute, value in node.attrs.items():
        if attribute == "value" and isinstance(value, gs.Constant):
            weight = weight_of(value)
            if weight.onnx_dtype == TensorProto.STRING:
                return None
            lifted = constant(name, weight)
            proto = skeleton_of(value, TensorProto)
            if proto is not None:
                lifted.skeleton = proto
            return lifted
        if attribute in _NUMBERS and isinstance(value, int | float | list):
            return constant(name, np.array(value, _NUMBERS[attribute]))
    return None
