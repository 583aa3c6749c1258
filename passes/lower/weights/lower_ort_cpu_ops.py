"""Few-bit weights in the operators of the project's own library."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.concepts.block_weights import BlockJob
from onnxslim_llm.concepts.concept import drop_unused_functions, replace_nodes
from onnxslim_llm.custom_ops import ops
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.ir.topology import sort_nodes
from onnxslim_llm.ir.weights.jobs import derive
from onnxslim_llm.passes.lower.weights.accuracy_choice import AccuracyChoice, check_largest_error
from onnxslim_llm.passes.lower.weights.activation_rounding import LARGEST_ERROR
from onnxslim_llm.passes.lower.weights.codes import BlockCall, Constants, take_calls
from onnxslim_llm.passes.lower.weights.epilogues import Epilogue, find_epilogue
from onnxslim_llm.passes.lower.weights.pack_job import PackJob
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.edit import Builder, detach
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass

__all__ = ["LowerOrtCpuOps"]

#: Widths that ONNX Runtime looks up itself.
_RUNTIME_TABLES = (2, 4, 8)


@dataclass(frozen=True)
class LowerOrtCpuOps(Pass):
    """Turn few-bit weights into the operators of onnxslim_llm.ops, with the weights as their kernels read them.

    ONNX Runtime maps such a weight from the file and nothing is rearranged when a session opens. A table that is also
    the classifier's weight is stored once. What is left is for `lower_ort_cpu`.

    Before:
        Y = onnxslim_llm.BlockMatMul <block_size = 32, scale_type = 1> (X, W_q4, W_scale, )
    After:
        Y = onnxslim_llm.ops.MatMulPacked <K, N, bits = 4, block_size = 32, accuracy = "int8"> (X, W_q4)

    A bias, a SiLU or a Gelu after the product, the product of two halves that makes a gate, and the sum with a residual
    (a tensor of the same shape) become part of it.

    Skips when:
        - a table of 2, 4 or 8 bits is only looked up in: ONNX Runtime's own operator is made for that;
        - the codes are no recorded work, because the model was saved half way.

    Attributes:
        accuracy: The least precision of products. "int8": activations are rounded to int8 in blocks of up to 32;
            "bf16": activations and weights to bfloat16; "exact": all in float32. "auto" measures what int8 and bf16 do
            to the results of each product and takes the fastest that is good enough. Products that came in with a
            precision of their own, or whose weight was quantized with one, keep it.
        largest_error: For "auto": relative error of results, root mean square.
        exact: Regular expressions: products with a match in the name of the weight or of the node are exact, whatever
            `accuracy` says. `diff` lists the layers whose results differ most.
        epilogues: Let the product's operator compute the bias, the SiLU or Gelu and the gate that follow it.
        residuals: Let it add the residual, too.
    """

    name: ClassVar[str] = "lower_ort_cpu_ops"
    group: ClassVar[str] = "lower"
    lossless: ClassVar[bool] = False  # int8 activations; and without lowering there is no artifact to fall back to

    accuracy: Literal["auto", "exact", "bf16", "int8"] = "auto"
    largest_error: float = LARGEST_ERROR
    exact: tuple[str, ...] = ()
    epilogues: bool = True
    residuals: bool = True

    def __post_init__(self) -> None:
        check_largest_error(self.largest_error, self.name)
        for pattern in self.exact:
            try:
                re.compile(pattern)
            except re.error as error:
                what = f"{pattern!r} is no regular expression: {error}"
                raise UsageError(what, where=f"{self.name}.exact") from error

    def apply(self, model: Model, context: Context) -> Change:
        """Replace products, and look-ups in what they multiply with."""
        change = Change()
        if self.residuals:
            infer_shapes(model)
        recorded, opaque = take_calls(model, leave_tables=_RUNTIME_TABLES)
        for node in opaque:
            change.skip(node.name, "its codes are no recorded work")
        constants, outputs = Constants(model), graph_output_ids(model)
        replaced: dict[int, list[gs.Node]] = {}
        removed: list[gs.Node] = []  # keeps them alive, so that their ids stay theirs
        fused: Counter[str] = Counter()
        late: dict[int, gs.Graph] = {}
        chosen = AccuracyChoice(self.accuracy, self.largest_error, context)
        for call in recorded:
            op = Builder(model, call.node.name or call.result.name)
            after = Epilogue(call.result, (call.job,))
            if not call.is_gather:
                after = find_epilogue(call, outputs, activations=self.epilogues, residual=self.residuals)
            for node in after.nodes:
                detach(node)
                removed.append(node)
                replaced[id(node)] = []
            if call.is_gather:
                result = _look_up(constants, op, call)
            else:
                accuracy = chosen.of(call, after.jobs, pinned=self._is_exact(call))
                result = _multiply(constants, op, call, after, accuracy)
            last = op.nodes[-1]
            assert last.outputs[0] is result
            last.outputs[0] = after.result
            replaced[id(call.node)] = op.nodes
            change.sites.append(call.node.name or call.result.name)
            fused.update(after.parts)
            if after.residual is not None:
                late[id(call.graph)] = call.graph
        replace_nodes(model, replaced)
        for graph in late.values():  # what is added may be made after the product was
            sort_nodes(graph)
        change.detail.update(chosen.account())
        change.detail.update({f"with_{name}": count for name, count in sorted(fused.items())})
        if replaced:
            drop_unused_functions(model)
            if model.opset(ops.DOMAIN) is None:
                model.set_opset(ops.DOMAIN, ops.VERSION)
        return change

    def _is_exact(self, call: BlockCall) -> bool:
        names = (call.job.where(), call.node.name)
        return any(re.search(pattern, name) for pattern in self.exact for name in names)


def _multiply(constants: Constants, op: Builder, call: BlockCall, after: Epilogue, accuracy: str) -> gs.Tensor:
    inputs = [call.operand, _packed(constants, call, after.jobs), after.bias, after.residual]
    while inputs[-1] is None:
        inputs.pop()
    return op.call(
        ops.DOMAIN,
        "MatMulPacked",
        *inputs,
        **_attributes(call),
        accuracy=accuracy,
        activation=after.activation if after.activation != "none" else None,
    )


def _look_up(constants: Constants, op: Builder, call: BlockCall) -> gs.Tensor:
    indices = call.operand
    if indices.dtype != "int64":
        indices = op.Cast(indices, to=TensorProto.INT64)
    rows = op.call(ops.DOMAIN, "GatherPacked", _packed(constants, call, (call.job,)), indices, **_attributes(call))
    return rows if call.scale_type == TensorProto.FLOAT else op.Cast(rows, to=call.scale_type)


def _packed(constants: Constants, call: BlockCall, jobs: tuple[BlockJob, ...]) -> gs.Constant:
    (weight,) = derive(PackJob(*jobs))
    return constants.shared(call, 0, weight)


def _attributes(call: BlockCall) -> dict[str, Any]:
    job = call.job
    return {"K": job.rows, "N": job.columns, "bits": job.scheme.bits, "block_size": call.stored_block("nbits")}
