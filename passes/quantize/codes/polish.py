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

from onnxslim_llm.passes.quantize.codes.compensate import Coded

__all__ = ["polish"]

Array = NDArray[Any]

SWEEPS = 2
_TINY = 1e-30


def polish(
    weight: Array,
    coded: Coded,
    gram: Array,
    block: int,
    levels: int,
    stored: Callable[[Array], Array],
    sweeps: int = SWEEPS,
) -> Coded:
    """Return better codes and scales for W[K, n]; zero points stay, and so does what is exactly zero in W.

    Args:
        weight: W, float32.
        coded: What it has; not changed.
        gram: H [K, K], float32.
        block: Rows that share a scale.
        levels: Largest code.
        stored: Rounds scales to what their type holds, as float32.
        sweeps: Times that all scales and codes are gone through.
    """
    rows = len(weight)
    kept = weight != 0
    centred = coded.codes.astype(np.float32)
    scales = coded.scales.astype(np.float32)
    zeros = coded.zeros.astype(np.float32)
    centred -= np.repeat(zeros, block, axis=0)[:rows]
    value = centred * np.repeat(scales, block, axis=0)[:rows]
    gradient = gram @ (weight - value)
    diagonal = np.maximum(np.diagonal(gram), _TINY)
    for _ in range(sweeps):
        for number, start in enumerate(range(0, rows, block)):
            stop = min(start + block, rows)
            part, own, g = slice(start, stop), gram[start:stop, start:stop], gradient[start:stop]
            before = value[part].copy()
            scale = _rescaled(centred[part], scales[number], own, g, stored)
            change = centred[part] * scale - before
            g -= own @ change
            value[part] += change
            scales[number] = scale
            inverse = np.where(scale == 0, 0, 1 / np.where(scale == 0, 1, scale)).astype(np.float32)
            low, high = -zeros[number], levels - zeros[number]
            for k in range(start, stop):
                i = k - start
                code = np.clip(np.rint((value[k] + g[i] / diagonal[k]) * inverse), low, high) * kept[k]
                moved = (code - centred[k]) * scale
                if moved.any():
                    g -= own[:, i, None] * moved
                    centred[k] = code
            value[part] = centred[part] * scale
            total = value[part] - before
            gradient[:start] -= gram[:start, part] @ total
            gradient[stop:] -= gram[stop:, part] @ total
    codes = centred + np.repeat(zeros, block, axis=0)[:rows]
    return Coded(codes.astype(np.uint8), scales.astype(coded.scales.dtype), coded.zeros)


def _rescaled(centred: Array, scale: Array, gram: Array, gradient: Array, stored: Callable[[Array], Array]) -> Array:
    """Return the scale of a block with the least error, all else as it is."""
    slope = np.einsum("kn,kn->n", centred, gradient)
    curvature = np.einsum("kn,kn->n", gram @ centred, centred)
    with np.errstate(over="ignore", invalid="ignore"):
        better = stored(scale + slope / np.maximum(curvature, _TINY)).astype(np.float32)
    usable = np.isfinite(better) & (curvature > _TINY) & (better != 0)
    return np.where(usable, better, scale)
