"""Look-ups in tables of few-bit codes with ai.onnx operators, dequantizing nothing but what is read.

Gather reads no 4-bit tensors, so their bytes are shown as uint8, and the codes are cut out of what was gathered.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.ir.weights import AliasWeight, Weight, dtypes
from onnxslim_llm.passes.lower.weights.codes import BlockCall, Constants
from onnxslim_llm.rewrite.edit import Builder

__all__ = ["gather_columns", "gather_rows"]

_BYTE = 8


def gather_rows(constants: Constants, op: Builder, call: BlockCall) -> gs.Tensor:
    """Look up rows of a table [N, K] of its own."""
    job, bits, indices = call.job, call.job.scheme.bits, call.operand
    rank = len(indices.shape)
    if bits == _BYTE:
        weights = call.weights("blocked_nk")
        codes, scales, *zeros = (op.Gather(constants.own(call, i, w), indices) for i, w in enumerate(weights))
        block = job.scheme.block_rows(job.rows)
    else:
        weights = call.weights("nbits")
        block = call.stored_block("nbits")
        signed = job.scheme.symmetric
        codes = _unpacked_row(constants, op, call, 0, weights[0], job.rows, signed)
        scales = op.Gather(constants.own(call, 1, weights[1]), indices)
        zeros = [_unpacked_row(constants, op, call, 2, w, weights[1].shape[1], signed) for w in weights[2:]]
    return op.DequantizeLinear(codes, _computed_in(op, call, scales, weights[1]), *zeros, axis=rank, block_size=block)


def gather_columns(constants: Constants, op: Builder, call: BlockCall) -> gs.Tensor:
    """Look up columns of the codes [K, N] that a classifier multiplies with: the same bytes under other names.

    A column lies scattered over the whole table, which costs a cache miss for each of its K elements: nothing beside
    the classifier's own pass over the table.
    """
    job, indices = call.job, call.operand
    rank = len(indices.shape)
    codes, scales, *zeros = call.weights("blocked_kn")
    place = _Place(constants, op, call, codes)
    values = [place.look_up(0, codes), op.Gather(constants.own(call, 1, scales), indices, axis=1)]
    values += [place.look_up(2, zero) for zero in zeros]
    values[1] = _computed_in(op, call, values[1], scales)
    columns = op.DequantizeLinear(*values, axis=0, block_size=job.scheme.block_rows(job.rows))
    return op.Transpose(columns, perm=[*range(1, rank + 1), 0])


def _computed_in(op: Builder, call: BlockCall, gathered: gs.Tensor, scales: Weight) -> gs.Tensor:
    return gathered if scales.onnx_dtype == call.scale_type else op.Cast(gathered, to=call.scale_type)


def _unpacked_row(
    constants: Constants, op: Builder, call: BlockCall, index: int, weight: Weight, count: int, signed: bool
) -> gs.Tensor:
    """Gather rows of bytes and cut them into `count` codes each, by way of a table of all bytes."""
    bits, indices = call.job.scheme.bits, call.operand
    rank = len(indices.shape)
    width = weight.nbytes // weight.shape[0]
    table = constants.own(call, index, AliasWeight(weight, (weight.shape[0], width), TensorProto.UINT8))
    byte = op.Cast(op.Gather(table, indices), to=TensorProto.INT32)
    codes = op.Reshape(op.Gather(_codes_of_bytes(bits, signed), byte), [0] * rank + [width * _BYTE // bits])
    if width * _BYTE // bits == count:
        return codes
    return op.Slice(codes, [0], [count], [rank])


def _codes_of_bytes(bits: int, signed: bool) -> np.ndarray[tuple[int, int], np.dtype[np.integer]]:
    """Return [256, codes in a byte]; lowest bits first. Signed codes are stored with an offset of 2^(bits - 1)."""
    shifts = np.arange(0, _BYTE, bits)
    codes = np.arange(256)[:, None] >> shifts & ((1 << bits) - 1)
    return (codes - (1 << bits - 1)).astype(np.int8) if signed else codes.astype(np.uint8)


class _Place:
    """Where the code of a column is: in which byte, and how far from its lowest bit; for zero points, too."""

    def __init__(self, constants: Constants, op: Builder, call: BlockCall, codes: Weight) -> None:
        self.constants, self.op, self.call = constants, op, call
        self.bits = dtypes.bits_of(codes.onnx_dtype)
        self.indices: gs.Tensor = call.operand
        if self.bits == _BYTE:
            return
        if self.indices.dtype != np.int64:
            self.indices = op.Cast(self.indices, to=TensorProto.INT64)
        per_byte = np.int64(_BYTE // self.bits)
        # Mod takes the sign of the divisor, so that negative indices count from the end, as in Gather.
        within = op.Mod(self.indices, per_byte)
        self.byte = op.Div(op.Sub(self.indices, within), per_byte)
        self.shift = op.Cast(op.Mul(within, np.int64(self.bits)), to=TensorProto.UINT8)

    def look_up(self, index: int, weight: Weight) -> gs.Tensor:
        """Return codes [K, ...] of the columns at the indices [...]."""
        op, bits = self.op, self.bits
        if bits == _BYTE:
            return op.Gather(self.constants.own(self.call, index, weight), self.indices, axis=1)
        rows, columns = weight.shape
        shown = AliasWeight(weight, (rows, columns * bits // _BYTE), TensorProto.UINT8)
        byte = op.Gather(self.constants.own(self.call, index, shown), self.byte, axis=1)
        code = op.BitwiseAnd(op.BitShift(byte, self.shift, direction="RIGHT"), np.uint8((1 << bits) - 1))
        if not self.call.job.scheme.symmetric:
            return code
        # Two's complement: codes from half of the range on are negative.
        half, whole = 1 << bits - 1, 1 << bits
        value = np.concatenate([np.arange(half), np.arange(half - whole, 0)]).astype(np.int8)
        return op.Gather(value, op.Cast(code, to=TensorProto.INT32))
