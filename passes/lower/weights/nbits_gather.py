"""Look-ups in tables of few-bit codes with ONNX Runtime's own operator."""

from __future__ import annotations

import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.ir.weights import AliasWeight
from onnxslim_llm.passes.lower.weights.codes import BlockCall, Constants
from onnxslim_llm.rewrite.edit import Builder

__all__ = ["gather_nbits"]


def gather_nbits(constants: Constants, op: Builder, call: BlockCall) -> gs.Tensor:
    """Look up rows of a table whose codes may also be those of a MatMulNBits node."""
    codes, scales, *zeros = call.weights("nbits")
    job, n, block = call.job, call.job.columns, call.stored_block("nbits")
    table = AliasWeight(codes, (n, codes.nbytes // n), TensorProto.UINT8)
    rows = op.call(
        "com.microsoft",
        "GatherBlockQuantized",
        constants.shared(call, 0, table),
        call.operand,
        constants.shared_scales(op, call, scales),
        *(constants.shared(call, 2, weight) for weight in zeros),
        bits=job.scheme.bits,
        block_size=block,
        gather_axis=0,
        quantize_axis=1,
    )
    if job.rows % block == 0:
        return rows
    return op.Slice(rows, [0], [job.rows], [len(call.operand.shape)])  # a short last block is stored in full
