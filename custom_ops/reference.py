"""The block quantizer in numpy: the specification that the native kernels must match bit for bit.

Every operation is one float32 operation per element, sums run in the order of k, and nothing is fused, so that any
vector width gives the same bits. RTN is round-to-nearest over the block's range; search is the data-free weighted
search of scale and zero point that the k-quants of llama.cpp made known: a grid of ranges, each with its least-squares
scale (see :func:`_search`). HQQ is the splitting of Half-Quadratic Quantization (Badri and Shaji, 2023), applied to the
scale instead of the zero point (see :func:`_hqq`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim_llm.custom_ops.layout import BlockSpec, TileBuffers
from onnxslim_llm.custom_ops.packing import pack, unpack

__all__ = ["GRID_SLACK", "REFITS", "SPLITTING_STEPS", "Statistics", "dequantize", "quantize_into"]

Floats = npt.NDArray[Any]  # float32 throughout; numpy's stubs turn quotients into float64
Array = npt.NDArray[Any]

GRID_SLACK = (-1.0, -0.5, 0.5, 1.0, 2.0, 3.0, 4.5, 6.0)
"""Steps that the search adds to the range, in sixteenths of the number of codes."""
REFITS = 2
"""Least-squares scales that the search tries after the grid."""
SPLITTING_STEPS = 20
"""Scales that the half-quadratic splitting tries after round-to-nearest's."""
SPLITTING_WEIGHT = 8.0
"""Of the quadratic term: residuals below SPLITTING_WEIGHT^(-2/3), a quarter of a step, are shrunk to 0."""

_SUM_ROWS = 32  # float sums are carried on in double after so many rows
_HALF_MAX = 65504.0


@dataclass(frozen=True)
class Statistics:
    """What quantizing a tile found out; the fields are described in ``quantize.TileResult``."""

    sq_error: float
    sq_weight: float
    nonfinite: int
    first_nonfinite: int | None


@dataclass(frozen=True)
class _Blocks:
    """A tile cut into blocks, each in its own unit: a power of two that brings its largest weight into [1, 2)."""

    spec: BlockSpec
    x: Floats  # [KB, block, N], in units, 0 beyond K
    unit: Floats  # [KB, N]
    inverse_unit: Floats
    low: Floats  # range of the block together with 0, in units
    high: Floats

    @property
    def levels(self) -> float:
        return float(2**self.spec.bits - 1)

    @property
    def middle(self) -> float:
        return float(2 ** (self.spec.bits - 1))


@dataclass(frozen=True)
class _Affine:
    """w ~ scale * (code - zero), scale in units; inverse is 1 / scale, or 0 for a scale of 0. All are [KB, N]."""

    scale: Floats
    inverse: Floats
    zero: Floats


def quantize_into(
    weight: Array, buffers: TileBuffers, first_column: int, method: str, importance: Floats | None
) -> Statistics:
    """Quantizes a tile W[K, n] and packs it into the buffers of the whole weight, from ``first_column`` on."""
    values = weight.astype(np.float32)
    bad = ~np.isfinite(values)
    values[bad] = 0.0
    blocks = _cut(values, buffers.spec)
    affine = _round_to_nearest(blocks)
    if method == "search":
        affine = _search(blocks, affine, _cut_importance(importance, blocks))
    elif method == "hqq":
        affine = _hqq(blocks, affine, _cut_importance(importance, blocks))
    codes, sq_error, sq_weight = _encode(blocks, affine)
    pack(codes, affine.scale * blocks.unit, affine.zero, buffers, first_column, weight.shape[0])
    return Statistics(sq_error, sq_weight, int(bad.sum()), int(np.argmax(bad)) if bad.any() else None)


def dequantize(buffers: TileBuffers) -> Floats:
    """The weight [K, N] that the codes stand for, float32."""
    codes, scales, zeros = unpack(buffers)
    block = buffers.spec.block_rows(buffers.rows)
    scale = np.repeat(scales.astype(np.float32), block, axis=0)[: buffers.rows]
    zero = np.repeat(zeros.astype(np.float32), block, axis=0)[: buffers.rows]
    return (codes.astype(np.float32) - zero) * scale


def _cut(values: Floats, spec: BlockSpec) -> _Blocks:
    rows, columns = values.shape
    block, count = spec.block_rows(rows), spec.block_count(rows)
    padded = np.zeros((count * block, columns), np.float32)
    padded[:rows] = values
    x = padded.reshape(count, block, columns)
    low, high = np.minimum(x.min(axis=1), 0.0), np.maximum(x.max(axis=1), 0.0)
    exponent = np.clip((np.maximum(high, -low).view(np.int32) >> 23) & 0xFF, 1, 253).astype(np.int32)
    unit, inverse = (exponent << 23).view(np.float32), ((254 - exponent) << 23).view(np.float32)
    return _Blocks(spec, x * inverse[:, None], unit, inverse, low * inverse, high * inverse)


def _cut_importance(importance: Floats | None, blocks: _Blocks) -> Floats:
    count, block, _ = blocks.x.shape
    cut = np.ones(count * block, np.float32)
    if importance is not None:
        cut[: importance.size] = importance
    return cut.reshape(count, block, 1)


def _reciprocal(x: Floats) -> Floats:
    return np.where(x == 0, np.float32(0), np.float32(1) / np.where(x == 0, np.float32(1), x))


def _affine(blocks: _Blocks, scale: Floats, zero: Floats) -> _Affine:
    """With the scale as its stored type holds it."""
    real = scale * blocks.unit
    if blocks.spec.scale_dtype == "float16":
        real = np.clip(real, -_HALF_MAX, _HALF_MAX).astype(np.float16).astype(np.float32)
    stored = np.where(real == 0, np.float32(0), real * blocks.inverse_unit)
    return _Affine(stored, _reciprocal(stored), zero)


def _spanning_scale(blocks: _Blocks, slack: float) -> Floats:
    """Scale that spans the range with ``slack`` more steps than there are codes.

    Symmetric codes run from -middle to middle - 1: the extreme of larger magnitude gets -middle, so a positive one has
    a negative scale.
    """
    if not blocks.spec.symmetric:
        return (blocks.high - blocks.low) / np.float32(blocks.levels + slack)
    extreme = np.where(blocks.high > -blocks.low, blocks.high, blocks.low)
    return extreme / np.float32(-(blocks.middle + slack))


def _spanning_zero(blocks: _Blocks, inverse: Floats, slack: float) -> Floats:
    """Integer zero point for a scale; half of the slack lies on either side of the range."""
    if blocks.spec.symmetric:
        return np.full_like(inverse, blocks.middle)
    zero = np.clip(np.rint(-blocks.low * inverse - np.float32(0.5 * slack)), 0, np.float32(blocks.levels))
    return np.where(inverse == 0, np.float32(blocks.middle), zero)


def _round_to_nearest(blocks: _Blocks) -> _Affine:
    affine = _affine(blocks, _spanning_scale(blocks, 0.0), np.zeros_like(blocks.low))
    return replace(affine, zero=_spanning_zero(blocks, affine.inverse, 0.0))


def _centred_code(blocks: _Blocks, affine: _Affine, k: int) -> Floats:
    """Code - zero of row k of every block."""
    steps = np.maximum(blocks.x[:, k] * affine.inverse, -affine.zero)
    code: Floats = np.rint(np.minimum(steps, np.float32(blocks.levels) - affine.zero))
    return code


def _fit(blocks: _Blocks, affine: _Affine, importance: Floats) -> tuple[Floats, Floats]:
    """Least-squares scale for the codes of ``affine``, and the energy that it explains."""
    correlation, energy = np.zeros_like(blocks.low), np.zeros_like(blocks.low)
    for k in range(blocks.x.shape[1]):
        code = _centred_code(blocks, affine, k)
        weighted = importance[:, k] * code
        correlation += weighted * blocks.x[:, k]
        energy += weighted * code
    scale: Floats = correlation / np.where(energy > 0, energy, np.float32(1))
    return scale, correlation * scale


def _error(blocks: _Blocks, affine: _Affine, importance: Floats) -> Floats:
    error = np.zeros_like(blocks.low)
    for k in range(blocks.x.shape[1]):
        difference = blocks.x[:, k] - affine.scale * _centred_code(blocks, affine, k)
        error += importance[:, k] * difference * difference
    return error


def _search(blocks: _Blocks, nearest: _Affine, importance: Floats) -> _Affine:
    """Lowers sum d (w - scale * (code - zero))^2 of each block, starting from round-to-nearest.

    For fixed codes the best scale is A / C with A = sum d w (code - zero) and C = sum d (code - zero)^2; it explains
    A^2 / C. The grid keeps the range whose codes explain most; the winner is refined by choosing codes anew for its
    least-squares scale, and taken only where its true error, with the scale as stored, is smaller.
    """
    best, best_error = nearest, _error(blocks, nearest, importance)
    scale, best_gain = _fit(blocks, nearest, importance)
    zero = nearest.zero
    for sixteenths in GRID_SLACK:
        slack = sixteenths * (blocks.levels + 1) / 16
        spanning = _spanning_scale(blocks, slack)
        inverse = _reciprocal(spanning)
        candidate = _Affine(spanning, inverse, _spanning_zero(blocks, inverse, slack))
        fitted, gain = _fit(blocks, candidate, importance)
        better = gain > best_gain
        best_gain = np.where(better, gain, best_gain)
        scale, zero = np.where(better, fitted, scale), np.where(better, candidate.zero, zero)
    for _ in range(REFITS):
        candidate = _affine(blocks, scale, zero)
        error = _error(blocks, candidate, importance)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best = _where(better, candidate, best)
        scale, _gain = _fit(blocks, candidate, importance)
    return best


def _hqq(blocks: _Blocks, nearest: _Affine, importance: Floats) -> _Affine:
    """Lowers sum d |w - scale * (code - zero)|^(1/2) of each block by half-quadratic splitting.

    With e standing for the residual w - scale * (code - zero), two steps alternate: e is the residual shrunk towards 0,
    which takes the large ones out, and the scale is the least-squares one for the weights w - e. The best scale seen is
    kept. The power 1/2 needs no more than a square root, which IEEE 754 rounds correctly.

    HQQ re-estimates the zero point, as the mean of code - (w - e) / scale. Where zero points are integers that mean is
    less than half a step away from the old one, unless most of the block is clipped, and rounds back to it.
    """
    best, candidate = nearest, nearest
    best_error = np.full_like(blocks.low, np.inf)
    for _ in range(SPLITTING_STEPS + 1):
        error, scale = _split(blocks, candidate, importance)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best = _where(better, candidate, best)
        candidate = _affine(blocks, scale, nearest.zero)
    return best


def _split(blocks: _Blocks, affine: _Affine, importance: Floats) -> tuple[Floats, Floats]:
    """One step of the splitting: the error of ``affine`` and the scale that follows it."""
    error, correlation, energy = (np.zeros_like(blocks.low) for _ in range(3))
    size = np.abs(affine.scale)
    shrinkage = size * np.sqrt(size) * np.float32(1 / SPLITTING_WEIGHT)
    for k in range(blocks.x.shape[1]):
        x, code = blocks.x[:, k], _centred_code(blocks, affine, k)
        residual = x - affine.scale * code
        distance = np.abs(residual)
        root = np.sqrt(distance)
        outlier = np.maximum(distance - shrinkage / np.where(root > 0, root, np.float32(1)), 0)
        weighted = importance[:, k] * code
        error += importance[:, k] * root
        correlation += weighted * (x - np.copysign(outlier, residual))
        energy += weighted * code
    return error, correlation / np.where(energy > 0, energy, np.float32(1))


def _where(chosen: npt.NDArray[np.bool_], yes: _Affine, no: _Affine) -> _Affine:
    return _Affine(
        np.where(chosen, yes.scale, no.scale),
        np.where(chosen, yes.inverse, no.inverse),
        np.where(chosen, yes.zero, no.zero),
    )


def _encode(blocks: _Blocks, affine: _Affine) -> tuple[Array, float, float]:
    """Codes [KB, block, N] as uint8, squared error and squared weight of the tile."""
    codes = np.empty(blocks.x.shape, np.uint8)
    error, weight = np.zeros(affine.zero.shape), np.zeros(affine.zero.shape)
    for start in range(0, blocks.x.shape[1], _SUM_ROWS):
        chunk_error, chunk_weight = np.zeros_like(affine.zero), np.zeros_like(affine.zero)
        for k in range(start, min(start + _SUM_ROWS, blocks.x.shape[1])):
            x, code = blocks.x[:, k], _centred_code(blocks, affine, k)
            difference = x - affine.scale * code
            chunk_error += difference * difference
            chunk_weight += x * x
            codes[:, k] = code + affine.zero
        error += chunk_error
        weight += chunk_weight
    squared_unit = blocks.unit.astype(np.float64) ** 2
    return codes, _ordered_sum(error * squared_unit), _ordered_sum(weight * squared_unit)


def _ordered_sum(blocks_by_columns: npt.NDArray[np.float64]) -> float:
    """Sums over the blocks of each column, then over columns, one after the other (np.sum would pair them up)."""
    by_column = np.cumsum(blocks_by_columns, axis=0)[-1]
    return float(np.cumsum(by_column)[-1])
