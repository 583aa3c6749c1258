"""Codes for columns of a weight: the best of several ways, judged by the product's output on samples held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.concepts.block_weights import WeightScheme
from onnxslim_llm.custom_ops.packing import unpack
from onnxslim_llm.custom_ops.quantize import BlockSpec, Layout, quantize_tile
from onnxslim_llm.passes.quantize.codes.compensate import Coded, Grid, compensate
from onnxslim_llm.passes.quantize.codes.planes import fit_grid, is_split, rounded, stored_scale
from onnxslim_llm.passes.quantize.codes.polish import polish
from onnxslim_llm.stats.curvature import inverse_factor, output_error
from onnxslim_llm.stats.prepared import Prepared
from onnxslim_llm.stats.statistics import Collected, StoredMoments

__all__ = ["InputKnowledge", "best_codes", "knowledge_of", "nearest_codes", "spec_of"]

Array = NDArray[Any]


@dataclass(frozen=True)
class InputKnowledge:
    """What is known of a product's input.

    Attributes:
        importance: Mean square of each channel [K], float32.
        factor: See `inverse_factor`; None if there is none.
        gram: H of the samples that codes are fitted to [K, K], float32.
        held: H of the samples that were held out, float32.
    """

    importance: Array
    factor: Array | None
    gram: Array
    held: Array


def spec_of(scheme: WeightScheme) -> BlockSpec:
    """Return the form of the compiled quantizer's work."""
    return BlockSpec(scheme.bits, scheme.block or -1, scheme.symmetric, scheme.scale_type)


def nearest_codes(piece: Array, scheme: WeightScheme, importance: Array | None = None) -> Coded:
    """Return codes of W[K, n], float32, by the scheme's search, without regard to other rows."""
    if is_split(scheme):
        return rounded(piece, scheme, importance)
    method = "search" if scheme.method == "calibrated" else scheme.method
    return Coded(*unpack(quantize_tile(piece, spec_of(scheme), method, importance, Layout.NBITS).buffers))


def best_codes(piece: Array, scheme: WeightScheme, known: InputKnowledge) -> tuple[Coded, Array]:
    """Return the best codes for each column of W[K, n], and its output error on the samples that were held out.

    Errors of the search that is weighted by the mean square of each channel are compensated, and that is polished.
    Columns where the search without data is better on the held-out samples get the best of all four.
    """
    block, levels = scheme.block_rows(len(piece)), (1 << scheme.bits) - 1

    def stored(scales: Array) -> Array:
        if is_split(scheme):
            return stored_scale(scales, scheme.scale_type)
        return scales.astype(scheme.scale_type).astype(np.float32)

    def lost(coded: Coded, original: Array) -> Array:
        return output_error(original - coded.dequantized(block), known.held)

    plain, weighted = nearest_codes(piece, scheme), nearest_codes(piece, scheme, known.importance)
    steps = [weighted] if known.factor is None else [weighted, _compensated(piece, scheme, known)]
    best = polish(piece, steps[-1], known.gram, block, levels, stored)
    errors, without_data = lost(best, piece), lost(plain, piece)
    worse = np.flatnonzero(without_data < errors)
    if len(worse):
        some = [_columns(coded, worse) for coded in (best, plain, *steps)]
        found = [errors[worse], without_data[worse], *(lost(coded, piece[:, worse]) for coded in some[2:])]
        best = _with_columns(best, worse, _best_of(some, np.argmin(found, axis=0)))
        errors[worse] = np.min(found, axis=0)
    return best, errors


def _compensated(piece: Array, scheme: WeightScheme, known: InputKnowledge) -> Coded:
    assert known.factor is not None
    # What an error of a row costs when the rows behind it have made up for what they can.
    counts = (1 / np.square(np.diagonal(known.factor), dtype=np.float64)).astype(np.float32)

    def fit(rows: Array, start: int) -> Grid:
        part = counts[start : start + len(rows)]
        if is_split(scheme):
            return fit_grid(rows, scheme, part)
        found = nearest_codes(np.ascontiguousarray(rows), replace(scheme, block=0), part)
        return Grid(found.scales[0], found.zeros[0])

    return compensate(piece, known.factor, scheme.block_rows(len(piece)), (1 << scheme.bits) - 1, fit)


def _columns(coded: Coded, columns: Array) -> Coded:
    return Coded(coded.codes[:, columns], coded.scales[:, columns], coded.zeros[:, columns])


def _with_columns(coded: Coded, columns: Array, others: Coded) -> Coded:
    result = Coded(coded.codes.copy(), coded.scales.copy(), coded.zeros.copy())
    for part in ("codes", "scales", "zeros"):
        getattr(result, part)[:, columns] = getattr(others, part)
    return result


def _best_of(candidates: Sequence[Coded], winner: Array) -> Coded:
    """Return each column from the candidate that `winner` [n] names."""
    result = candidates[0]
    for i, candidate in enumerate(candidates[1:], 1):
        columns = np.flatnonzero(winner == i)
        result = _with_columns(result, columns, _columns(candidate, columns))
    return result


def _prepare(collected: Collected, ridge: float) -> InputKnowledge:
    grams = []
    for part in (collected.fit, collected.held):
        assert part.gram is not None
        grams.append(part.gram + ridge * part.count * np.eye(part.size))
    importance = (collected.fit.mean_square + ridge).astype(np.float32)
    fit, held = (gram.astype(np.float32) for gram in grams)
    return InputKnowledge(importance, inverse_factor(grams[0]), fit, held)


_KNOWLEDGE = Prepared(_prepare)


def knowledge_of(moments: StoredMoments, ridge: float = 0.0) -> InputKnowledge:
    """Return what codes are chosen by, made once for all columns of a weight.

    Args:
        moments: Of the input of the product.
        ridge: Added to the diagonal of the mean of H.
    """
    return _KNOWLEDGE.of(moments, ridge)
