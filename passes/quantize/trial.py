"""What a weight loses when it is quantized, tried out on some of its columns."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.concepts.block_weights import WeightScheme
from onnxslim_llm.custom_ops.packing import unpack_bits
from onnxslim_llm.custom_ops.quantize import BlockSpec, Layout, quantize_tile
from onnxslim_llm.ir.weights import ArrayWeight
from onnxslim_llm.passes.quantize.calibrated_job import CalibratedJob
from onnxslim_llm.passes.quantize.columns import columns_of
from onnxslim_llm.stats.statistics import StoredMoments

__all__ = ["columns_of", "held_error", "lost", "quickly_coded"]

Array = NDArray[Any]


def quickly_coded(columns: Array, scheme: WeightScheme, importance: Array) -> Array:
    """Return what columns [n, K] become when they are quantized without compensation of errors, float32.

    Args:
        columns: float32.
        scheme: How; "calibrated" is approximated by a search weighted by `importance`.
        importance: [K], mean squares of the input.
    """
    count, rows = columns.shape
    spec = BlockSpec(scheme.bits, scheme.block or -1, scheme.symmetric, scheme.scale_type)
    method = "search" if scheme.method == "calibrated" else scheme.method
    weights = importance.astype(np.float32) if scheme.method == "calibrated" else None
    buffers = quantize_tile(columns.T, spec, method, weights, Layout.NBITS).buffers
    block, blocks = spec.block_rows(rows), spec.block_count(rows)
    values = unpack_bits(buffers.codes, scheme.bits, block).astype(np.float32)
    if buffers.zero_points is None:
        values -= 2 ** (scheme.bits - 1)
    else:
        values -= unpack_bits(buffers.zero_points, scheme.bits, blocks)[..., None]
    values *= buffers.scales[..., None]
    result: Array = values.reshape(count, -1)[:, :rows]
    return result


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
    if scheme.method == "calibrated":
        job = CalibratedJob(ArrayWeight(columns), 1, scheme, "trial", moments)
        job.compute()
        assert job.figures is not None
        return float(job.figures["output_error"])
    held = moments.load().held
    assert held.gram is not None, moments.file
    change = columns - quickly_coded(columns, scheme, held.mean_square)
    return lost(change, held.gram.astype(np.float32))
