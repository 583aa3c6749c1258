"""What a weight loses when it is quantized, tried out on some of its columns."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.concepts.block_weights import WeightScheme
from onnxslim_llm.custom_ops.packing import unpack_bits
from onnxslim_llm.custom_ops.quantize import Layout, quantize_tile
from onnxslim_llm.passes.quantize.codes.coding import best_codes, knowledge_of, nearest_codes, spec_of
from onnxslim_llm.passes.quantize.codes.planes import is_split
from onnxslim_llm.stats.statistics import StoredMoments

__all__ = ["coded", "held_error", "lost", "quickly_coded"]

Array = NDArray[Any]


def quickly_coded(columns: Array, scheme: WeightScheme, importance: Array) -> Array:
    """Return what columns [n, K] become when they are quantized without compensation of errors, float32.

    Args:
        columns: float32.
        scheme: How; "calibrated" is approximated by a search weighted by `importance`.
        importance: [K], mean squares of the input.
    """
    count, rows = columns.shape
    weights = importance.astype(np.float32) if scheme.method == "calibrated" else None
    if is_split(scheme):
        block = scheme.block_rows(rows)
        return np.ascontiguousarray(nearest_codes(columns.T, scheme, weights).dequantized(block).T)
    method = "search" if scheme.method == "calibrated" else scheme.method
    spec = spec_of(scheme)
    buffers = quantize_tile(columns.T, spec, method, weights, Layout.NBITS).buffers
    values = unpack_bits(buffers.codes, scheme.bits, spec.block_rows(rows)).astype(np.float32)
    if buffers.zero_points is None:
        values -= 2 ** (scheme.bits - 1)
    else:
        values -= unpack_bits(buffers.zero_points, scheme.bits, spec.block_count(rows))[..., None]
    values *= buffers.scales[..., None]
    result: Array = values.reshape(count, -1)[:, :rows]
    return result


def coded(columns: Array, scheme: WeightScheme, moments: StoredMoments) -> Array:
    """Return what columns [n, K] become when they are quantized by the very method that the scheme names, float32.

    Args:
        columns: float32.
        scheme: How.
        moments: Of the input.
    """
    if scheme.method != "calibrated":
        return quickly_coded(columns, scheme, np.ones(columns.shape[1]))
    found, _ = best_codes(np.ascontiguousarray(columns.T), scheme, knowledge_of(moments))
    return np.ascontiguousarray(found.dequantized(scheme.block_rows(columns.shape[1])).T)


def lost(change: Array, gram: Array) -> float:
    """Return the squared error, summed over the rows of X, that a change [n, K] of columns makes in X W.

    Args:
        change: E^T, float32.
        gram: H = X^T X [K, K], float32.
    """
    return float(np.einsum("nk,nk->", change @ gram, change, dtype=np.float64))


def held_error(columns: Array, scheme: WeightScheme, moments: StoredMoments) -> float:
    """Return the squared error that quantizing columns [n, K] makes in x W on the samples that were held out.

    Args:
        columns: float32.
        scheme: How, by the very method that it names.
        moments: Of x.
    """
    held = moments.load().held
    assert held.gram is not None, moments.file
    return lost(columns - coded(columns, scheme, moments), held.gram.astype(np.float32))
