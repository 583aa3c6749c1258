"""Few-bit weights in the operators of the project's own library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.concepts.concept import calls, drop_unused_functions, inline_call, replace_nodes
from onnxslim_llm.custom_ops import ops
from onnxslim_llm.errors import CompilerBug
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.weights.jobs import derive
from onnxslim_llm.passes.lower.codes import BlockCall, Constants, take_calls
from onnxslim_llm.passes.lower.nbits_gather import gather_nbits
from onnxslim_llm.passes.lower.pack_job import PackJob
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.passes import Change, Pass

__all__ = ["LowerOrtCpuOps"]

_ORT_DOMAIN, _ORT_VERSION = "com.microsoft", 1


@dataclass(frozen=True)
class LowerOrtCpuOps(Pass):
    """Turn few-bit weights into the operators of onnxslim_llm.ops, with the weights as their kernels read them.

    ONNX Runtime maps such a weight from the file and nothing is rearranged when a session opens. A table that is also
    the classifier's weight is stored once. A table of its own is looked up by ONNX Runtime's operator.

    Before:
        Y = onnxslim_llm.BlockMatMul <block_size = 32, scale_type = 1> (X, W_q4, W_scale, )
        H = onnxslim_llm.BlockGather <block_size = 32, scale_type = 1> (input_ids, E_q8, E_scale, )
    After:
        Y = onnxslim_llm.ops.MatMulPacked <K, N, bits = 4, block_size = 32, accuracy = "int8"> (X, W_q4)
        H = com.microsoft.GatherBlockQuantized <bits = 8, block_size = 32> (E_q8, input_ids, E_scale)

    Skips when:
        - the codes are no recorded work, because the model was saved half way: it gets the portable form.

    Attributes:
        accuracy: The least precision of products. "int8": activations are rounded to int8 in blocks; "bf16":
            activations and weights to bfloat16; "exact": all in float32. Products that came in with a precision of
            their own keep it.
    """

    name: ClassVar[str] = "lower_ort_cpu_ops"
    group: ClassVar[str] = "lower"
    lossless: ClassVar[bool] = False  # int8 activations; and without lowering there is no artifact to fall back to

    accuracy: Literal["exact", "bf16", "int8"] = "int8"

    def apply(self, model: Model, context: Context) -> Change:
        """Replace all calls."""
        change = Change()
        recorded, opaque = take_calls(model)
        for node in opaque:
            change.skip(node.name, "its codes are no recorded work: it gets the portable form")
        replaced = {id(node): inline_call(model, node) for node in opaque}
        constants = Constants(model)
        for call in recorded:
            op = Builder(model, call.node.name or call.result.name)
            result = self._lower(model, constants, op, call)
            last = op.nodes[-1]
            assert last.outputs[0] is result
            last.outputs[0] = call.result
            replaced[id(call.node)] = op.nodes
            change.sites.append(call.node.name or call.result.name)
        replace_nodes(model, replaced)
        if replaced:
            drop_unused_functions(model)
        change.sites += [node.name for node in opaque]
        return change

    def ensures(self, model: Model, context: Context) -> None:
        """Check that no concept is left.

        Raises:
            CompilerBug: One is.
        """
        for _, node in calls(model):
            raise CompilerBug("a concept is left after lowering", where=f"{node.op} '{node.name}'")

    def _lower(self, model: Model, constants: Constants, op: Builder, call: BlockCall) -> gs.Tensor:
        if call.is_gather and not call.tied:
            _import(model, _ORT_DOMAIN, _ORT_VERSION)
            return gather_nbits(constants, op, call)
        _import(model, ops.DOMAIN, ops.VERSION)
        return _look_up(constants, op, call) if call.is_gather else self._multiply(constants, op, call)

    def _multiply(self, constants: Constants, op: Builder, call: BlockCall) -> gs.Tensor:
        accuracy = call.job.accuracy or self.accuracy
        packed = _packed(constants, call)
        return op.call(ops.DOMAIN, "MatMulPacked", call.operand, packed, **_attributes(call), accuracy=accuracy)


def _look_up(constants: Constants, op: Builder, call: BlockCall) -> gs.Tensor:
    indices = call.operand
    if indices.dtype != "int64":
        indices = op.Cast(indices, to=TensorProto.INT64)
    rows = op.call(ops.DOMAIN, "GatherPacked", _packed(constants, call), indices, **_attributes(call))
    return rows if call.scale_type == TensorProto.FLOAT else op.Cast(rows, to=call.scale_type)


def _packed(constants: Constants, call: BlockCall) -> gs.Constant:
    (weight,) = derive(PackJob(call.job))
    return constants.shared(call, 0, weight)


def _attributes(call: BlockCall) -> dict[str, int]:
    job = call.job
    return {"K": job.rows, "N": job.columns, "bits": job.scheme.bits, "block_size": call.stored_block("nbits")}


def _import(model: Model, domain: str, version: int) -> None:
    if model.opset(domain) is None:
        model.set_opset(domain, version)
