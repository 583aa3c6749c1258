"""The recorded work of moving the mean error of a quantized product into its bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.ir.weights.jobs import TensorSpec, Tile, TileOutput, WeightJob, derive
from onnxslim_llm.ir.weights.weight import Weight
from onnxslim_llm.passes.quantize.codes.job import QuantizeJob
from onnxslim_llm.stats.moments import Moments
from onnxslim_llm.stats.statistics import StoredMoments

__all__ = ["BiasJob", "shift_of"]

Array = NDArray[Any]

#: Columns that are dequantized at a time.
_COLUMNS = 512


def shift_of(error: Array, fit: Moments, held: Moments) -> tuple[Array, Array]:
    """Return what to add to the results of a product, and by how much that lowers the squared error.

    The mean of x E is m E with the mean m of x (Nagel et al. 2019, arXiv 1906.04721). Where that makes the error on
    the samples that were held out larger, nothing is added.

    Args:
        error: E = W - W^ [K, n], float32.
        fit: Moments of x that the mean is taken from.
        held: Of the samples that were held out.

    Returns:
        The shift [n], and the squared error on the held-out samples that it takes away [n], float64.
    """
    shift = fit.mean @ error.astype(np.float64)
    gain = shift * (2 * (held.total @ error.astype(np.float64)) - held.count * shift)
    better = gain > 0
    return np.where(better, shift, 0), np.where(better, gain, 0)


class BiasJob(WeightJob):
    """A bias plus the mean error of the product before it. The weight is quantized once more for it.

    Args:
        bias: [N], or [1, N] and the like; float32 or float16.
        job: The work that quantizes the weight.
        moments: Of the input of the product.
    """

    def __init__(self, bias: Weight, job: QuantizeJob, moments: StoredMoments) -> None:
        self._job = job.with_layout("blocked_kn")
        self._codes = derive(self._job)
        self._moments = moments
        self.inputs = (bias, job.inputs[0], *self._codes)
        self.outputs = (TensorSpec(bias.shape, bias.onnx_dtype),)
        self.fingerprint = f"bias v1 {moments.digest} K={job.k_axis}"

    def where(self) -> str:
        """Return the name of the weight."""
        return f"bias after {self._job.where()}"

    def tiles(self) -> Sequence[Tile]:
        """Return the whole: a bias is small, and its parts would quantize the weight several times."""
        return [Tile(0, self._job.columns, self.inputs[1].nbytes)]

    def run(self, tile: Tile) -> TileOutput:
        """Add the shift of every column."""
        collected = self._moments.load()
        source = self.inputs[1].view()
        matrix = source if self._job.k_axis == 0 else source.T
        codes, scales = (weight.view() for weight in self._codes[:2])
        zeros = self._codes[2].view() if len(self._codes) > 2 else None
        block = self._job.stored_block
        shift = np.empty(self._job.columns)
        gain = 0.0
        for start in range(0, self._job.columns, _COLUMNS):
            part = slice(start, start + _COLUMNS)
            coded = codes[:, part].astype(np.float32)
            if zeros is not None:
                coded -= np.repeat(zeros[:, part].astype(np.float32), block, axis=0)[: len(coded)]
            coded *= np.repeat(scales[:, part].astype(np.float32), block, axis=0)[: len(coded)]
            shift[part], gains = shift_of(matrix[:, part].astype(np.float32) - coded, collected.fit, collected.held)
            gain += float(gains.sum())
        bias = self.inputs[0].view()
        moved = (bias.astype(np.float64) + shift.reshape(bias.shape)).astype(bias.dtype)
        stats = {"shifted_columns": float(np.count_nonzero(shift)), "output_error_less": gain}
        return TileOutput([(0, 0, np.ascontiguousarray(moved).view(np.uint8).reshape(-1))], stats)
