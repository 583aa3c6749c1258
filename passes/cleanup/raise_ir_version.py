"""Models of the first ONNX releases, where every initializer had to be an input as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_graphsurgeon as gs

from onnxslim_llm.ir.proto.skeleton import GraphSkeleton, skeleton_of
from onnxslim_llm.rewrite.passes import Change, Pass

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["RaiseIrVersion"]

#: Since this version an initializer need not be an input; one that is can be given another value by the caller.
FREE_INITIALIZERS = 4


@dataclass(frozen=True)
class RaiseIrVersion(Pass):
    """Raise an IR version below 4 to 4, so that initializers are constants and no longer have to be listed as inputs.

    Runtimes do not count them among the inputs of such a model anyway.

    Before:
        <ir_version: 3, opset_import: ["" : 8]>
        agraph (float[2] x, float[2] w = {1, 2}) => (float[2] y) {
            y = Add (x, w)
        }

    After:
        <ir_version: 4, opset_import: ["" : 8]>
        agraph (float[2] x) => (float[2] y)
        <float[2] w = {1, 2}>
        {
            y = Add (x, w)
        }

    Skips when:
        - the IR version is 4 or higher: an initializer among the inputs is a default then
    """

    name: ClassVar[str] = "raise_ir_version"
    group: ClassVar[str] = "cleanup"

    def apply(self, model: Model, context: Context) -> Change:
        """Take the initializers out of the inputs of all graphs."""
        change = Change()
        version = model.graph.ir_version
        if not version or version >= FREE_INITIALIZERS:
            return change
        model.graph.ir_version = FREE_INITIALIZERS
        change.sites.append("ir_version")
        for graph in model.graphs():
            skeleton: GraphSkeleton | None = skeleton_of(graph, GraphSkeleton)
            if skeleton is not None:
                listed = [tensor.name for _, tensor in skeleton.inputs if isinstance(tensor, gs.Constant)]
                skeleton.inputs = [pair for pair in skeleton.inputs if not isinstance(pair[1], gs.Constant)]
                change.sites += listed
        return change
