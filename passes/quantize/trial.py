"""What a weight loses when it is quantized, tried out on some of its columns."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.concepts.block_weights import WeightScheme
from onnxslim_llm.custom_ops.packing import unpack
from onnxslim_llm.custom_ops.quantize import BlockSpec, Layout, quantize_tile
from onnxslim_llm.ir.weights import ArrayWeight, Weight
from onnxslim_llm.passes.quantize.calibrated_job import CalibratedJob
from onnxslim_llm.passes.quantize.compensate import Coded
from onnxslim_llm.stats.curvature import output_error
from onnxslim_llm.stats.statistics import StoredMoments

__all__ = ["columns_of", "held_error", "quickly_coded"]

Array = NDArray[Any]


def columns_of(weight: Weight, k_axis: int, count: int) -> Array:
    """Return W[K, n] in float32: up to `count` columns, spread evenly.

    Columns are quantized independently of each other, so that some of them say how all of them fare.
    """
    view = weight.view()
    matrix = view if k_axis == 0 else view.T
    total = matrix.shape[1]
    index = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))
    result = np.ascontiguousarray(matrix[:, index], dtype=np.float32)
    weight.release()
    return result


def quickly_coded(matrix: Array, scheme: WeightScheme, importance: Array) -> Array:
    """Return what W[K, n] becomes when it is quantized without compensation of errors, float32.

    Args:
        matrix: W, float32.
        scheme: How; "calibrated" is approximated by a search weighted by `importance`.
        importance: [K], mean squares of the input.
    """
    spec = BlockSpec(scheme.bits, scheme.block or -1, scheme.symmetric, scheme.scale_type)
    weighted = scheme.method == "calibrated"
    method = "search" if scheme.method == "calibrated" else scheme.method
    weights = importance.astype(np.float32) if weighted else None
    found = quantize_tile(np.ascontiguousarray(matrix), spec, method, weights, Layout.NBITS)
    return Coded(*unpack(found.buffers)).dequantized(scheme.block_rows(len(matrix)))


def held_error(matrix: Array, scheme: WeightScheme, moments: StoredMoments) -> float:
    """Return the squared error that quantizing W[K, n] makes in x W on the samples that were held out.

    Args:
        matrix: W, float32.
        scheme: How, by the very method that it names.
        moments: Of x.
    """
    if scheme.method == "calibrated":
        job = CalibratedJob(ArrayWeight(matrix), 0, scheme, "trial", moments)
        job.compute()
        assert job.figures is not None
        return float(job.figures["output_error"])
    held = moments.load().held
    assert held.gram is not None, moments.file
    error = matrix - quickly_coded(matrix, scheme, held.mean_square)
    return float(output_error(error, held.gram).sum())
