"""Tables that are made for a weight: weighted k-means (Lloyd 1982) on numbers or on short vectors of them.

First entries are drawn by what the ones before them cost (k-means++, Arthur & Vassilvitskii 2007).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["cluster", "nearest", "pairs_of"]

Array = NDArray[Any]

_ROUNDS = 25
#: Vectors that distances to all entries are computed of at a time.
_TOGETHER = 1 << 14
#: Vectors that first entries are drawn from.
_DRAWN_FROM = 1 << 12


def pairs_of(values: Array) -> Array:
    """Return all pairs of 16 numbers as a table [256, 2]; the low half of a code is the first of both."""
    return np.stack([np.tile(values, len(values)), np.repeat(values, len(values))], axis=1)


def nearest(vectors: Array, book: Array, importance: Array | None = None) -> NDArray[np.uint8]:
    """Return the entry with the least weighted squared distance to each vector, [m].

    Args:
        vectors: [m, d] float32.
        book: [k, d] float32, k at most 256.
        importance: Weights of the squared differences, [m, d]; None for 1.
    """
    values = book[:16, 0]
    if np.array_equal(book, pairs_of(values)) and (np.diff(values) >= 0).all():
        # Both numbers of a pair are nearest for themselves, whatever their importance.
        numbers = np.searchsorted((values[1:] + values[:-1]) / 2, vectors).astype(np.uint8)
        pair: NDArray[np.uint8] = (numbers[:, 0] + 16 * numbers[:, 1]).astype(np.uint8)
        return pair
    found = np.empty(len(vectors), np.uint8)
    squares = np.square(book)
    for start in range(0, len(vectors), _TOGETHER):
        part = slice(start, start + _TOGETHER)
        if importance is None:
            distances = squares.sum(axis=1) - 2 * (vectors[part] @ book.T)
        else:
            distances = importance[part] @ squares.T - 2 * ((importance[part] * vectors[part]) @ book.T)
        found[part] = distances.argmin(axis=1)
    return found


def cluster(vectors: Array, importance: Array, count: int, seed: int) -> Array:
    """Return a table [count, d] float32 whose entries are near the vectors, as far as they are important.

    Entries that no vector takes move to the vectors that are worst off.

    Args:
        vectors: [m, d] float32.
        importance: Weights of the squared differences [m, d], none negative.
        count: Entries of the table, at most 256.
        seed: Of the choice of the first entries.
    """
    book = _spread_out(vectors, importance, count, np.random.default_rng(seed))
    if vectors.shape[1] == 1:  # numbers start at their quantiles: nothing is left to chance
        book = np.quantile(vectors, (np.arange(count) + 0.5) / count, axis=0).astype(np.float32)
    before = np.full(len(vectors), count, np.int64)
    for _ in range(_ROUNDS):
        codes = nearest(vectors, book, importance).astype(np.int64)
        if np.array_equal(codes, before):
            break
        before = codes
        for j in range(vectors.shape[1]):
            weight = np.bincount(codes, importance[:, j], count)
            total = np.bincount(codes, importance[:, j] * vectors[:, j], count)
            book[:, j] = np.where(weight > 0, total / np.where(weight > 0, weight, 1), book[:, j])
        empty = np.flatnonzero(np.bincount(codes, minlength=count) == 0)
        if len(empty):
            loss = (importance * np.square(vectors - book[codes])).sum(axis=1)
            worst = np.argsort(-loss, kind="stable")[: len(empty)]
            book[empty[: len(worst)]] = vectors[worst]
    return book


def _spread_out(vectors: Array, importance: Array, count: int, random: np.random.Generator) -> Array:
    """Return first entries for a table, [count, d]."""
    places = random.permutation(len(vectors))[:_DRAWN_FROM]
    vectors, importance = vectors[places].astype(np.float32), importance[places]
    book = np.empty((count, vectors.shape[1]), np.float32)
    losses = importance.sum(axis=1, dtype=np.float64)
    for entry in range(count):
        total = losses.cumsum()
        chosen = np.searchsorted(total, random.random() * total[-1]) if total[-1] > 0 else entry
        book[entry] = vectors[min(int(chosen), len(vectors) - 1)]
        distances = (importance * np.square(vectors - book[entry])).sum(axis=1, dtype=np.float64)
        losses = distances if entry == 0 else np.minimum(losses, distances)
    return book
