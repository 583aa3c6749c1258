"""Codes and scales that a weight already has, changed one after the other while that makes the output's error smaller.

The error of a column is (w - q)^T H (w - q), quadratic in every scale and every code. Given the others, the best scale
of a block is known in closed form, and so is the best value of one code, rounded to the grid. With the gradient
r = H (w - q) at hand either takes a few operations; the error never grows but by the rounding of scales to their type.
Coordinate descent over codes is what QuIP calls greedy rounding (Chee et al. 2023, arXiv 2307.13304).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.passes.quantize.codes.compensate import RUN, Coded

__all__ = ["polish"]

Array = NDArray[Any]

#: Times that all scales and codes are gone through: the first saves 5 to 10 % of the error, the second 1 to 3 %.
SWEEPS = 2
#: Rows from which on once must do: a sweep takes 3.5 times as long as the product H W.
_MANY_ROWS = 2048
#: Share of the error that a sweep must have saved for another one.
_WORTH_A_SWEEP = 0.005
_TINY = 1e-30


def polish(
    weight: Array,
    coded: Coded,
    gram: Array,
    block: int,
    levels: int,
    stored: Callable[[Array], Array],
    sweeps: int | None = None,
) -> Coded:
    """Return better codes and scales for W[K, n]; zero points stay, and so does what is exactly zero in W.

    Args:
        weight: W, float32.
        coded: What it has; not changed.
        gram: H [K, K], float32.
        block: Rows that share a scale.
        levels: Largest code.
        stored: Rounds scales to what their type holds, as float32.
        sweeps: Times that all scales and codes are gone through, at most; None: twice, and once if K is large.
    """
    rows = len(weight)
    sweeps = sweeps if sweeps is not None else SWEEPS if rows < _MANY_ROWS else 1
    kept = weight != 0
    centred = coded.codes.astype(np.float32)
    scales = coded.scales.astype(np.float32)
    zeros = coded.zeros.astype(np.float32)
    centred -= np.repeat(zeros, block, axis=0)[:rows]
    missing = weight - centred * np.repeat(scales, block, axis=0)[:rows]
    diagonal = np.maximum(np.diagonal(gram), _TINY)
    for _ in range(sweeps):
        error = saved = 0.0
        for number, start in enumerate(range(0, rows, block)):
            part = slice(start, min(start + block, rows))
            own, gradient = gram[part, part], gram[part] @ missing
            before, slope = missing[part].copy(), gradient.copy()
            scale = _rescaled(centred[part], scales[number], own, gradient, stored)
            missing[part] = weight[part] - centred[part] * scale
            gradient += own @ (missing[part] - before)
            scales[number] = scale
            lowest = -zeros[number]
            _recode(centred[part], kept[part], scale, own, gradient, diagonal[part], lowest, lowest + levels)
            missing[part] = weight[part] - centred[part] * scale
            error += float(np.vdot(before, slope))
            saved += float(np.vdot(before - missing[part], slope + gradient))
        if saved < _WORTH_A_SWEEP * error:
            break
    codes = centred + np.repeat(zeros, block, axis=0)[:rows]
    return Coded(codes.astype(np.uint8), scales.astype(coded.scales.dtype), coded.zeros)


def _recode(
    centred: Array,
    kept: Array,
    scale: Array,
    gram: Array,
    gradient: Array,
    diagonal: Array,
    low: Array,
    high: Array,
) -> None:
    """Give each row of a block its best codes, one row after the other.

    Args:
        centred: Codes without their zero points [B, n]; changed.
        kept: Where codes may be other than 0 [B, n].
        scale: Of the block [n].
        gram: The block's part of H [B, B].
        gradient: H (w - q) [B, n]; changed along.
        diagonal: Of H, positive [B].
        low: Least code [n].
        high: Largest code [n].
    """
    inverse = np.where(scale == 0, 0, 1 / np.where(scale == 0, 1, scale)).astype(np.float32)
    rows = len(centred)
    for first in range(0, rows, RUN):
        last = min(first + RUN, rows)
        moved = np.empty((last - first, centred.shape[1]), np.float32)
        for k in range(first, last):
            code = np.clip(np.rint(centred[k] + gradient[k] * (inverse / diagonal[k])), low, high) * kept[k]
            np.multiply(code - centred[k], scale, out=moved[k - first])
            centred[k] = code
            gradient[k:last] -= gram[k:last, k, None] * moved[k - first]
        gradient[:first] -= gram[:first, first:last] @ moved
        gradient[last:] -= gram[last:, first:last] @ moved


def _rescaled(centred: Array, scale: Array, gram: Array, gradient: Array, stored: Callable[[Array], Array]) -> Array:
    """Return the scale of a block with the least error, all else as it is."""
    slope = np.einsum("kn,kn->n", centred, gradient)
    curvature = np.einsum("kn,kn->n", gram @ centred, centred)
    with np.errstate(over="ignore", invalid="ignore"):
        better = stored(scale + slope / np.maximum(curvature, _TINY)).astype(np.float32)
    usable = np.isfinite(better) & (curvature > _TINY) & (better != 0)
    return np.where(usable, better, scale)
