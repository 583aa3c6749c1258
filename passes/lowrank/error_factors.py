"""Two thin matrices of few bits for the error of a quantized weight, and what each rank of them leaves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.concepts.block_weights import BlockJob
from onnxslim_llm.ir.weights.jobs import derive
from onnxslim_llm.stats.curvature import output_error
from onnxslim_llm.stats.statistics import Collected
from onnxslim_llm.stats.whitened import Alike, low_rank, whitened_by

__all__ = ["Coded", "ErrorFactors", "coded", "error_factors"]

Array = NDArray[Any]

_LARGEST_CODE = {4: 7, 8: 127}
_STORED = {4: np.dtype(ml_dtypes.int4), 8: np.dtype(np.int8)}


@dataclass(frozen=True)
class Coded:
    """A factor in codes with a scale for each of its r directions.

    Attributes:
        codes: [K, r] or [r, N], whole numbers as float32.
        scale: [r], float32 that float16 holds exactly.
        axis: That of the directions.
        bits: 4 or 8.
    """

    codes: Array = field(repr=False)
    scale: Array = field(repr=False)
    axis: int
    bits: int

    def part(self, rank: int) -> Coded:
        """Return the first directions."""
        codes = self.codes[:, :rank] if self.axis == 1 else self.codes[:rank]
        return Coded(codes, self.scale[:rank], self.axis, self.bits)

    @property
    def value(self) -> Array:
        """The matrix that the codes stand for, float32."""
        result: Array = self.codes * (self.scale if self.axis == 1 else self.scale[:, None])
        return result

    @property
    def stored(self) -> Array:
        """The codes as they are stored."""
        result: Array = self.codes.astype(_STORED[self.bits])
        return result


@dataclass(frozen=True)
class ErrorFactors:
    """A B ~ W - W_q.

    Attributes:
        left: A [K, r].
        right: B [r, N].
        errors: By rank that may be chosen: the squared error in the output on held-out samples, in the weight without
            data. Rank 0 is what there is without products.
        signal: The same for W itself.
    """

    left: Coded
    right: Coded
    errors: dict[int, float]
    signal: float

    def nbytes(self, rank: int, scale_bytes: int) -> int:
        """Return the bytes of codes and scales."""
        codes = [part.part(rank).codes.size for part in (self.left, self.right)]
        return sum(-(-size * self.left.bits // 8) for size in codes) + 2 * rank * scale_bytes


def coded(matrix: Array, axis: int, bits: int) -> Coded:
    """Return codes, with the scale of each direction: of columns (axis 1) or rows (0)."""
    limit = _LARGEST_CODE[bits]
    largest = np.abs(matrix).max(axis=1 - axis)
    # Through float16, so that the same scales hold where activations have this type.
    scale = np.maximum(largest / limit, np.finfo(np.float16).tiny).astype(np.float16).astype(np.float32)
    wide = scale if axis == 1 else scale[:, None]
    return Coded(np.clip(np.rint(matrix / wide), -limit, limit).astype(np.float32), scale, axis, bits)


def error_factors(job: BlockJob, ranks: list[int], bits: int, known: Collected | None) -> ErrorFactors | str:
    """Return the factors of the largest of some ranks, and what each of the ranks leaves; or why there are none.

    Args:
        job: The quantization.
        ranks: Rising.
        bits: Of the factors' codes.
        known: The moments of the input; None weighs all channels alike.
    """
    source = job.preview(0, job.columns)
    if source is None:
        return "the source weight is not at hand, or is stored in two planes"
    error = source - _decoded(job)
    whitening = Alike() if known is None or known.fit.gram is None else whitened_by(known.fit.gram)
    if whitening is None:
        return "the calibration data are zero where it reads them"
    found = low_rank(error, whitening, ranks[-1])
    left, right = coded(found.left, 1, bits), coded(found.right, 0, bits)
    errors = {0: _squared(error, known)}
    rest, done = error, 0
    for rank in ranks:
        rest = rest - left.value[:, done:rank] @ right.value[done:rank]
        errors[rank], done = _squared(rest, known), rank
    return ErrorFactors(left, right, errors, _squared(source, known))


def _decoded(job: BlockJob) -> Array:
    """Return what the codes stand for [K, N], float32; the work is done now, and again when the model is saved."""
    plain = job.with_layout("blocked_kn")
    codes, scales, *zeros = (weight.load() for weight in derive(plain))
    value = codes.astype(np.float32)
    block, rows = plain.stored_block, plain.rows
    if zeros:
        value -= np.repeat(zeros[0].astype(np.float32), block, axis=0)[:rows]
    result: Array = value * np.repeat(scales.astype(np.float32), block, axis=0)[:rows]
    return result


def _squared(error: Array, known: Collected | None) -> float:
    if known is None:
        return float(np.square(error, dtype=np.float64).sum())
    assert known.held.gram is not None
    # Of one row of the input, as gains are.
    return float(output_error(error.astype(np.float32), known.held.gram).sum()) / max(known.held.count, 1)
