"""Tables and scales for a weight, and the codes of its columns."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.passes.quantize.codebook.assign import compensated, decoded, fitted_scales, plain
from onnxslim_llm.passes.quantize.codebook.books import FIXED_BOOKS, fixed_book
from onnxslim_llm.passes.quantize.codebook.clusters import cluster, nearest, pairs_of
from onnxslim_llm.passes.quantize.codebook.form import BookForm
from onnxslim_llm.passes.quantize.codes.coding import InputKnowledge
from onnxslim_llm.stats.curvature import output_error

__all__ = ["best_codes", "make_books"]

Array = NDArray[Any]

#: Vectors that a table is made from; more of them change it hardly.
_SAMPLE = 1 << 16
#: Ranges of a fixed table, by the largest weight of the block.
_RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


def make_books(columns: Array, form: BookForm, importance: Array | None) -> Array:
    """Return tables [stages, 256, d], float16 values in float32, for a weight of which some columns are given.

    Args:
        columns: [K, n] float32.
        form: How the weight is to be coded.
        importance: Weight of the squared error in each row [K], or None.
    """
    if form.kind in FIXED_BOOKS:
        return _pairs(fixed_book(form.kind))
    scales = _spread(columns, form.block)
    by_row = np.repeat(scales, form.block, axis=0)
    shape = columns / np.where(by_row == 0, 1, by_row)
    weights = np.square(by_row) * (np.ones(len(columns)) if importance is None else importance)[:, None]
    length = 1 if form.pairs else form.length
    vectors, weights = (_sampled(m.astype(np.float32), length) for m in (shape, weights))
    if form.pairs:
        return _pairs(np.sort(cluster(vectors, weights, 16, seed=0)[:, 0]))
    books = []
    for stage in range(form.stages):
        book = cluster(vectors, weights, 256, seed=stage).astype(np.float16).astype(np.float32)
        vectors = vectors - book[nearest(vectors, book, weights)]
        books.append(book)
    return np.stack(books)


def best_codes(
    piece: Array, form: BookForm, books: Array, known: InputKnowledge | None
) -> tuple[NDArray[np.uint8], Array]:
    """Return codes [stages, K / d, n] and scales [KB, n] (float16 values) for columns W[K, n].

    With data, each column takes of several ways the one with the least error in the product's output on samples that
    were held out: the nearest entries, the nearest ones by the inputs' mean squares, and those that make up for the
    errors of others.
    """
    if known is None:
        return _nearest(piece, form, books, None)
    ways = [_nearest(piece, form, books, None), _nearest(piece, form, books, known.importance)]
    if known.factor is not None:
        scales = ways[1][1]
        ways.append((compensated(piece, scales, books, known.factor), scales))
    errors = np.stack([output_error(piece - decoded(*way, books), known.held) for way in ways])
    winner = errors.argmin(axis=0)
    codes, scales = ways[0][0].copy(), ways[0][1].copy()
    for i, way in enumerate(ways[1:], 1):
        codes[..., winner == i] = way[0][..., winner == i]
        scales[..., winner == i] = way[1][..., winner == i]
    return codes, scales


def _nearest(piece: Array, form: BookForm, books: Array, importance: Array | None) -> tuple[NDArray[np.uint8], Array]:
    weights = np.ones(len(piece)) if importance is None else importance
    if form.kind in FIXED_BOOKS:
        scales = _best_range(piece, form, books, weights)
    else:
        scales = _spread(piece, form.block)
        codes = plain(piece, _stored(scales), books, importance)
        scales = fitted_scales(piece, codes, books, scales, weights)
    scales = _stored(scales)
    return plain(piece, scales, books, importance), scales


def _best_range(piece: Array, form: BookForm, books: Array, weights: Array) -> Array:
    """Return the scales that cut off as much of each block as makes its weighted squared error least."""
    blocks = piece.reshape(-1, form.block, piece.shape[1])
    largest = np.abs(blocks).max(axis=1)
    best: Array = largest
    least = np.full(largest.shape, np.inf)
    for share in _RANGES:
        scales = _stored(largest * share)
        codes = plain(piece, scales, books, None)
        errors = np.square(piece - decoded(codes, scales, books)) * weights[:, None]
        loss = errors.reshape(blocks.shape).sum(axis=1)
        best = np.where(loss < least, scales, best)
        least = np.minimum(loss, least)
    return best


def _pairs(values: Array) -> Array:
    table: Array = pairs_of(values.astype(np.float16).astype(np.float32))
    return table.reshape(1, *table.shape)


def _spread(matrix: Array, block: int) -> Array:
    """Return the root mean square of each block, [KB, n]."""
    blocks = matrix.reshape(-1, block, matrix.shape[1])
    result: Array = np.sqrt(np.square(blocks, dtype=np.float64).mean(axis=1)).astype(np.float32)
    return result


def _stored(scales: Array) -> Array:
    limits = np.finfo(np.float16)
    result: Array = np.clip(scales, 0, limits.max).astype(np.float16).astype(np.float32)
    return result


def _sampled(matrix: Array, length: int) -> Array:
    """Return up to `_SAMPLE` vectors of `length` rows of [K, n], evenly spread, [m, length]."""
    rows, columns = matrix.shape
    vectors = matrix.reshape(rows // length, length, columns).transpose(0, 2, 1).reshape(-1, length)
    places = np.unique(np.linspace(0, len(vectors) - 1, min(len(vectors), _SAMPLE)).round().astype(np.int64))
    result: Array = np.ascontiguousarray(vectors[places])
    return result
