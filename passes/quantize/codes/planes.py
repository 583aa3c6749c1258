"""Codes of 5 and 6 bits, stored as two planes that targets have kernels for: W = W_high + W_low.

With c the code, h = c div 4 its high bits and l = c mod 4 its two low ones, scale * (c - zero) is
4 scale * (h - zero_h) + scale * (l - zero_l), where zero = 4 zero_h + zero_l. With the zero points of symmetric planes,
2^(bits - 3) and 2, both are weights of their own, and the product is the sum of two.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.concepts.block_weights import WeightScheme
from onnxslim_llm.passes.quantize.codes.compensate import Coded, Grid

__all__ = [
    "LOW_BITS",
    "PLANES",
    "fit_grid",
    "is_split",
    "plane_of",
    "plane_scheme",
    "rounded",
    "stored_scale",
    "zero_of",
]

Array = NDArray[Any]

#: Bits of both planes, by the bits that they make together.
PLANES = {5: (3, 2), 6: (4, 2)}
LOW_BITS = 2
_STEP = 1 << LOW_BITS
#: Ranges that scales are tried for, by the range of the block: cutting off the largest weights makes finer steps.
_RANGES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8)


def is_split(scheme: WeightScheme) -> bool:
    """Return whether codes of a scheme are stored as two planes."""
    return scheme.bits in PLANES


def plane_scheme(scheme: WeightScheme, index: int) -> WeightScheme:
    """Return the scheme of the high (0) or the low (1) plane."""
    return replace(scheme, bits=PLANES[scheme.bits][index], symmetric=True)


def zero_of(bits: int) -> int:
    """Return the code of 0."""
    high, low = PLANES[bits]
    return _STEP * (1 << high - 1) + (1 << low - 1)


def stored_scale(scales: Array, scale_type: str) -> Array:
    """Return scales as their type holds them, float32; four times as much must fit, too."""
    if scale_type == "float32":
        return scales.astype(np.float32)
    largest = float(np.finfo(np.float16).max) / _STEP
    return np.clip(scales, -largest, largest).astype(np.float16).astype(np.float32)


def fit_grid(rows: Array, scheme: WeightScheme, importance: Array | None) -> Grid:
    """Return scales for a block of W[B, n], the best of some ranges.

    Args:
        rows: float32.
        scheme: With 5 or 6 bits.
        importance: What the squared error of each row counts [B].
    """
    zero, levels = zero_of(scheme.bits), (1 << scheme.bits) - 1
    low, high = np.minimum(rows.min(axis=0), 0), np.maximum(rows.max(axis=0), 0)
    # There are more codes below 0 than above: the extreme of larger magnitude gets them.
    sign = np.where(high > -low, -1.0, 1.0).astype(np.float32)
    reach = np.maximum(np.maximum(high, -low) / zero, np.minimum(high, -low) / (levels - zero))
    best = np.zeros(rows.shape[1], np.float32)
    least = np.full(rows.shape[1], np.inf, np.float32)
    weights = np.ones(len(rows), np.float32) if importance is None else importance.astype(np.float32)
    for part in _RANGES:
        scale = stored_scale(sign * reach * np.float32(part), scheme.scale_type)
        error = np.square(rows - (_nearest(rows, scale, zero, levels) - zero) * scale).T @ weights
        better = error < least
        least, best = np.where(better, error, least), np.where(better, scale, best)
    return Grid(best, np.full(rows.shape[1], zero, np.uint8))


def rounded(piece: Array, scheme: WeightScheme, importance: Array | None) -> Coded:
    """Return the nearest codes of W[K, n], block by block."""
    block, zero, levels = scheme.block_rows(len(piece)), zero_of(scheme.bits), (1 << scheme.bits) - 1
    codes = np.empty(piece.shape, np.uint8)
    grids = []
    for start in range(0, len(piece), block):
        rows = piece[start : start + block]
        grid = fit_grid(rows, scheme, None if importance is None else importance[start : start + block])
        codes[start : start + block] = _nearest(rows, grid.scales, zero, levels)
        grids.append(grid)
    return Coded(codes, np.stack([g.scales for g in grids]), np.stack([g.zeros for g in grids]))


def plane_of(coded: Coded, bits: int, index: int) -> Coded:
    """Return the high (0) or the low (1) plane of codes, as the codes of a symmetric weight."""
    width = PLANES[bits][index]
    zeros = np.full(coded.zeros.shape, 1 << width - 1, np.uint8)
    if index == 0:
        return Coded(coded.codes >> LOW_BITS, coded.scales * np.float32(_STEP), zeros)
    return Coded(coded.codes & np.uint8(_STEP - 1), coded.scales, zeros)


def _nearest(rows: Array, scale: Array, zero: int, levels: int) -> Array:
    inverse = np.where(scale == 0, 0, 1 / np.where(scale == 0, 1, scale)).astype(np.float32)
    result: Array = np.clip(np.rint(rows * inverse) + zero, 0, levels)
    return result
