"""Products of packed weights in numpy: the specification of the C++ kernels.

The int8 mode is specified to the bit: every instruction set and :func:`matmul` give the same float32 sums, because the
sums inside a block are exact integers and the blocks are added one after the other, each step rounded to float32. The
other modes are bounded, because their sums are taken in any order.

Activation epilogues are specified by their formulas in float64; kernels use polynomials.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from onnxslim_llm.custom_ops.packed import unpack
from onnxslim_llm.custom_ops.packing import unpack_bits

__all__ = ["Accuracy", "Activation", "Epilogue", "dequantize", "matmul", "quantize_activations"]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

DOT_ROWS = 32
"""Rows of K that share a scale of int8 activations, or the block of the weight where that is shorter."""
NEGLIGIBLE = float(np.float32(2.0**-120))
"""Blocks of activations whose largest magnitude is below count as zero: 127 / magnitude must stay finite."""


class Accuracy(IntEnum):
    """The least precision that a product may have."""

    EXACT = 0
    BF16 = 1
    INT8 = 2


class Activation(IntEnum):
    """What is applied to the columns of the product; the gated ones multiply by the other half of the columns."""

    NONE = 0
    SILU = 1
    GELU = 2
    GELU_TANH = 3
    SILU_GATE = 4
    GELU_GATE = 5
    GELU_TANH_GATE = 6


@dataclass(frozen=True)
class Epilogue:
    """What follows the product: ``activate(x + (a @ low_rank_u) @ low_rank_v + bias) + residual``.

    Attributes:
        bias: [N], of the type of the activations.
        activation: see :class:`Activation`.
        residual: the shape and type of the result.
        low_rank_u: float32 [K, rank].
        low_rank_v: float32 [rank, N].
    """

    bias: Array | None = None
    activation: Activation = Activation.NONE
    residual: Array | None = None
    low_rank_u: Floats | None = None
    low_rank_v: Floats | None = None


def _decoded(packed: Array) -> tuple[int, Array, Array, Array]:
    """Block, codes - zero points int32 [K padded to blocks, N], scales float32 [KB, N], zero points [KB, N]."""
    scheme, codes, scales, zero_points = unpack(packed)
    count = math.ceil(scheme.rows / scheme.block)
    zeros = np.full((scheme.columns, count), 2 ** (scheme.bits - 1), np.int32)
    if zero_points is not None:
        zeros = unpack_bits(zero_points, scheme.bits, count).astype(np.int32)
    whole = unpack_bits(codes, scheme.bits, scheme.block).astype(np.int32)
    centred = (whole - zeros[:, :, None]).reshape(scheme.columns, -1).T
    return scheme.block, centred, scales.astype(np.float32).T, zeros.T


def dequantize(packed: Array) -> Floats:
    """The weight [K, N]: ``(code - zero point) * scale``, rounded to float32."""
    scheme = unpack(packed)[0]
    block, centred, scales, _zeros = _decoded(packed)
    weight: Floats = centred.astype(np.float32) * np.repeat(scales, block, axis=0)
    return weight[: scheme.rows]


def quantize_activations(a: Floats, block: int) -> tuple[npt.NDArray[np.int8], Floats]:
    """Codes [M, KB, block] and scales [M, KB] of float32 activations [M, K], K padded with zeros.

    The largest magnitude of a block becomes 127; ties are rounded to even. A block with NaN or infinity has codes 0 and
    the scale NaN.
    """
    rows, k = a.shape
    count = math.ceil(k / block)
    x = np.zeros((rows, count * block), np.float32)
    x[:, :k] = a
    x = x.reshape(rows, count, block)
    most = np.abs(x).max(axis=2)
    finite = np.isfinite(x).all(axis=2)
    usable = finite & (most >= np.float32(NEGLIGIBLE))
    safe = np.where(usable, most, np.float32(1))
    steps = np.where(usable[:, :, None], x, np.float32(0)) * (np.float32(127) / safe)[:, :, None]
    scales = np.where(finite, np.where(usable, safe / np.float32(127), np.float32(0)), np.float32(np.nan))
    return np.rint(steps).astype(np.int8), scales.astype(np.float32)


def _int8_product(a: Floats, packed: Array) -> Floats:
    block, centred, scales, _zeros = _decoded(packed)
    step = min(block, DOT_ROWS)
    codes, a_scales = quantize_activations(a, step)
    sums = np.zeros((a.shape[0], centred.shape[1]), np.float32)
    for i in range(codes.shape[1]):
        rows = slice(i * step, (i + 1) * step)
        if rows.start >= centred.shape[0]:
            break  # the padding of K beyond the last block
        dot = (codes[:, i].astype(np.int32) @ centred[rows]).astype(np.float32)
        with np.errstate(all="ignore"):
            sums += dot * (scales[i * step // block][None, :] * a_scales[:, i, None])
    return sums


def _bf16(x: Array) -> Array:
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def _float_product(a: Floats, packed: Array, accuracy: Accuracy) -> npt.NDArray[np.float64]:
    weight = dequantize(packed)
    with np.errstate(all="ignore"):
        if accuracy is Accuracy.BF16:
            rounded: npt.NDArray[np.float64] = _bf16(a) @ _bf16(weight)
            return rounded
        return a.astype(np.float64) @ weight.astype(np.float64)


def _activate(activation: Activation, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    result: npt.NDArray[np.float64] = x
    if activation in (Activation.SILU, Activation.SILU_GATE):
        result = x / (1 + np.exp(-x))
    if activation in (Activation.GELU, Activation.GELU_GATE):
        erf: npt.NDArray[np.float64] = np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2))
        result = x / 2 * (1 + erf)
    if activation in (Activation.GELU_TANH, Activation.GELU_TANH_GATE):
        result = x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return result


def matmul(a: Array, packed: Array, accuracy: Accuracy = Accuracy.EXACT, epilogue: Epilogue | None = None) -> Array:
    """``a @ dequantize(packed)`` with its epilogue.

    Args:
        a: [M, K] of float32, float16 or bfloat16.
        packed: uint8, see :mod:`packed`.
        accuracy: what may be rounded; INT8 is what kernels of that mode give to the bit in float32 without an epilogue,
            unless they do better (AMX in bfloat16).
        epilogue: what follows.

    Returns:
        [M, N], or [M, N / 2] with a gate, of the type of ``a``.

    Raises:
        ValueError: ``packed`` is no packed weight, or the shapes do not fit.
    """
    scheme = unpack(packed)[0]
    if a.ndim != 2 or a.shape[1] != scheme.rows:
        raise ValueError(f"activations of shape {list(a.shape)} do not fit a weight of {scheme.rows} rows")
    after = epilogue or Epilogue()
    if after.activation >= Activation.SILU_GATE and not scheme.paired:
        raise ValueError("a gated activation needs a weight packed in paired halves")
    wide = a.astype(np.float32)
    x: Array = _int8_product(wide, packed) if accuracy is Accuracy.INT8 else _float_product(wide, packed, accuracy)
    parts = (after.bias, after.residual, after.low_rank_u)
    if after.activation is Activation.NONE and all(part is None for part in parts):
        return x.astype(a.dtype)
    with np.errstate(all="ignore"):
        x = x.astype(np.float64)
        if after.low_rank_u is not None and after.low_rank_v is not None:
            x = x + (wide.astype(np.float64) @ after.low_rank_u) @ after.low_rank_v
        if after.bias is not None:
            x = x + after.bias.astype(np.float64)
        if after.activation >= Activation.SILU_GATE:
            half = scheme.columns // 2
            x = _activate(after.activation, x[:, :half]) * x[:, half:]
        else:
            x = _activate(after.activation, x)
        if after.residual is not None:
            x = x + after.residual.astype(np.float64)
        return x.astype(a.dtype)
