"""Few-bit weights in standard ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.block_weights import BLOCK_MATMUL
from onnxslim_llm.concepts.concept import calls, drop_unused_functions, inline_call, replace_nodes
from onnxslim_llm.errors import CompilerBug, UsageError
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.weights import ViewWeight, dtypes
from onnxslim_llm.passes.lower.stored.stored_job import widened
from onnxslim_llm.passes.lower.stored.stored_nodes import check_own_operators
from onnxslim_llm.passes.lower.weights.codes import BlockCall, Constants, take_calls
from onnxslim_llm.passes.lower.weights.tables import gather_columns, gather_rows
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.passes import Change, Pass

__all__ = ["LowerPortable"]

_BITS = (2, 4, 8)
_EXACT_NOTE = (
    "exact products: a standard model cannot say so; open sessions with the entry session.disable_quant_qdq = 1, which "
    "dequantizes weights to float32 at load, or ONNX Runtime rounds activations to int8"
)


@dataclass(frozen=True)
class LowerPortable(Pass):
    """Turn few-bit weights into DequantizeLinear nodes of ai.onnx 21.

    Products get the form that ONNX Runtime fuses into an int4 or int8 kernel when it loads the model: blocks along axis
    0 of [K, N], one DequantizeLinear a product, initializers that no other node reads. A weight with several readers
    gets an initializer for each, all on the same bytes of the file. Look-ups dequantize only what they read: rows of
    their own table, or, if a classifier shares it, columns of the classifier's codes, seen as bytes.

    Before:
        Y = onnxslim_llm.BlockMatMul <block_size = 32, scale_type = 1> (X, W_q4, W_scale, )
    After:
        W = DequantizeLinear <axis = 0, block_size = 32> (W_q4, W_scale)
        Y = MatMul (X, W)

    Skips when:
        - a tied table has a number of rows whose codes do not fill whole bytes: its look-up then stores a second copy.
    """

    name: ClassVar[str] = "lower_portable"
    group: ClassVar[str] = "lower"
    lossless: ClassVar[bool] = False  # int8 activations; and without lowering there is no artifact to fall back to

    def requires(self, model: Model, context: Context) -> None:
        """Check that none of our own operators is left.

        Raises:
            ModelError: One could not be taken apart, and the target has no other form of it.
        """
        check_own_operators(model, context)

    def apply(self, model: Model, context: Context) -> Change:
        """Replace all calls.

        Raises:
            UsageError: Weights of a width that the standard has no type for.
        """
        change = Change()
        recorded, opaque = take_calls(model)
        replaced = {id(node): inline_call(model, node) for node in opaque}
        constants = Constants(model)
        for call in recorded:
            call.job = widened(call.job) or call.job
            if call.job.scheme.bits not in _BITS:
                what = f"ai.onnx has no type for {call.job.scheme.bits}-bit weights"
                raise UsageError(what, where=call.job.where(), todo="choose 2, 4 or 8 bits")
            op = Builder(model, call.node.name or call.result.name)
            result = self._lower(constants, op, call, change)
            last = op.nodes[-1]
            assert last.outputs[0] is result
            last.outputs[0] = call.result
            replaced[id(call.node)] = op.nodes
        nodes = [*opaque, *(call.node for call in recorded)]
        change.sites = [node.name or node.op for node in nodes]
        replace_nodes(model, replaced)
        if replaced:
            drop_unused_functions(model)
            products = sum(BLOCK_MATMUL.is_call(node) for node in nodes)
            change.detail.update(products=products, look_ups=len(nodes) - products)
            if any(call.job.accuracy == "exact" and not call.is_gather for call in recorded):
                context.notes.append(_EXACT_NOTE)
        return change

    def ensures(self, model: Model, context: Context) -> None:
        """Check that no concept is left.

        Raises:
            CompilerBug: One is.
        """
        for _, node in calls(model):
            raise CompilerBug("a concept is left after lowering", where=f"{node.op} '{node.name}'")

    def _lower(self, constants: Constants, op: Builder, call: BlockCall, change: Change) -> gs.Tensor:
        if not call.is_gather:
            return _multiply(constants, op, call)
        if call.tied and _rows_fill_bytes(call):
            return gather_columns(constants, op, call)
        if call.tied:
            reason = f"{call.job.columns} codes of {call.job.scheme.bits} bits do not fill whole bytes: stored twice"
            change.skip(call.constants[0].name, reason)
        return gather_rows(constants, op, call)


def _rows_fill_bytes(call: BlockCall) -> bool:
    codes = call.weights("blocked_kn")[0]
    return call.job.columns * dtypes.bits_of(codes.onnx_dtype) % 8 == 0


def _multiply(constants: Constants, op: Builder, call: BlockCall) -> gs.Tensor:
    weights = list(call.weights("blocked_kn"))
    attributes = {"axis": 0, "block_size": call.job.stored_block}
    if not call.job.scheme.block:  # a scale per column has a form of its own
        weights[1:] = [ViewWeight.reshape(weight, (call.job.columns,)) for weight in weights[1:]]
        attributes = {"axis": 1}
    codes, scales, *zeros = (constants.own(call, i, weight) for i, weight in enumerate(weights))
    if weights[1].onnx_dtype != call.scale_type:
        scales = op.Cast(scales, to=call.scale_type)
    return op.MatMul(call.operand, op.DequantizeLinear(codes, scales, *zeros, **attributes))
