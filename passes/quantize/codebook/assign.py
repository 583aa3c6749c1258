"""Which entries of given tables a weight's vectors take, alone or making up for the errors of those before them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.passes.quantize.codebook.clusters import nearest

__all__ = ["compensated", "decoded", "fitted_scales", "plain"]

Array = NDArray[Any]

#: Rows after which errors are passed on to all rows behind them, as one product.
_LAZY_ROWS = 64


def plain(weight: Array, scales: Array, books: Array, importance: Array | None) -> NDArray[np.uint8]:
    """Return the nearest entries for each vector by itself: codes [stages, K / d, n].

    Args:
        weight: W [K, n] float32.
        scales: [KB, n] float32.
        books: [stages, 256, d] float32.
        importance: Weight of the squared error in each row [K], or None.
    """
    stages, _, length = books.shape
    groups = len(weight) // length
    rest = weight / _safe(_by_row(scales, len(weight)))
    weights = None
    if importance is not None:
        # A row's error counts by its scale, too: entries are compared after the scale is divided out.
        weights = _vectors(np.square(_by_row(scales, len(weight))) * importance[:, None], length)
    codes = np.empty((stages, groups, weight.shape[1]), np.uint8)
    for stage in range(stages):
        found = nearest(_vectors(rest, length), books[stage], weights)
        codes[stage] = found.reshape(groups, -1)
        rest = rest - _unfolded(books[stage][codes[stage]])
    return codes


def compensated(weight: Array, scales: Array, books: Array, factor: Array) -> NDArray[np.uint8]:
    """Return codes [stages, K / d, n], each vector making up for the errors of those before it.

    GPTVQ (van Baalen et al. 2024, arXiv 2402.15319): GPTQ with d rows at a time. With U the upper factor of H^-1 and
    U_g its block on the diagonal, a change e of these rows costs ||U_g^-T e||^2, and the rows behind take back
    U_g,rest^T U_g^-T e.

    Args:
        weight: W [K, n] float32.
        scales: [KB, n] float32.
        books: [stages, 256, d] float32.
        factor: What `inverse_factor` returned, [K, K].
    """
    stages, _, length = books.shape
    rows, columns = weight.shape
    work = np.array(weight, np.float32)
    scale = _by_row(scales, rows)
    codes = np.empty((stages, rows // length, columns), np.uint8)
    for first in range(0, rows, _LAZY_ROWS):
        stop = min(first + _LAZY_ROWS, rows)
        errors = np.empty((stop - first, columns), np.float32)
        for start in range(first, stop, length):
            part = slice(start, start + length)
            inverse = np.linalg.inv(factor[part, part].astype(np.float64)).astype(np.float32)
            # All rows of a vector share a scale: it multiplies the distances, and changes none of their order.
            s = scale[start]
            rest = work[part] / _safe(s)
            for stage in range(stages):
                # e^T U_g^-1 is a plain distance where vectors and entries are multiplied with U_g^-1.
                found = nearest(np.ascontiguousarray((inverse.T @ rest).T), books[stage] @ inverse)
                codes[stage, start // length] = found
                rest = rest - books[stage][found].T
            error = inverse.T @ (rest * s)
            errors[start - first : start - first + length] = error
            if start + length < stop:
                work[start + length : stop] -= factor[part, start + length : stop].T @ error
        if stop < rows:
            work[stop:] -= factor[first:stop, stop:].T @ errors
    return codes


def decoded(codes: NDArray[np.uint8], scales: Array, books: Array) -> Array:
    """Return what codes [stages, K / d, n] stand for, [K, n] float32."""
    total = _unfolded(books[0][codes[0]])
    for book, stage in zip(books[1:], codes[1:], strict=True):
        total = total + _unfolded(book[stage])
    result: Array = total * _by_row(scales, len(total))
    return result


def fitted_scales(weight: Array, codes: NDArray[np.uint8], books: Array, scales: Array, importance: Array) -> Array:
    """Return the scales [KB, n] with the least weighted squared error for codes that are given.

    Args:
        weight: W [K, n].
        codes: [stages, K / d, n].
        books: [stages, 256, d].
        scales: [KB, n], taken where a block's codes are all zero.
        importance: [K].
    """
    shape = decoded(codes, np.ones_like(scales), books)
    blocks = len(scales)
    weighted = shape * importance[:, None]
    over = (weighted * weight).reshape(blocks, -1, weight.shape[1]).sum(axis=1)
    under = (weighted * shape).reshape(blocks, -1, weight.shape[1]).sum(axis=1)
    result: Array = np.where((under > 0) & (over > 0), over / np.where(under > 0, under, 1), scales)
    return result.astype(np.float32)


def _by_row(scales: Array, rows: int) -> Array:
    result: Array = np.repeat(scales, rows // len(scales), axis=0)
    return result


def _safe(scales: Array) -> Array:
    result: Array = np.where(scales == 0, 1, scales)
    return result


def _vectors(matrix: Array, length: int) -> Array:
    """Return [K, n] as vectors along K, [K / d * n, d]."""
    rows, columns = matrix.shape
    result: Array = np.ascontiguousarray(matrix.reshape(rows // length, length, columns).transpose(0, 2, 1))
    return result.reshape(-1, length)


def _unfolded(vectors: Array) -> Array:
    """Return vectors [K / d, n, d] as [K, n]."""
    groups, columns, length = vectors.shape
    result: Array = vectors.transpose(0, 2, 1).reshape(groups * length, columns)
    return result
