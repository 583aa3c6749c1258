"""What stands for tokens that are left out: the kept ones with the most similar embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["nearest_tokens", "work_of"]

Array = NDArray[Any]

_ROWS = 1024  # of the tokens left out, compared at a time


def work_of(vocabulary: int, kept: int, size: int) -> float:
    """Return the multiplications that `nearest_tokens` takes."""
    return float(vocabulary - kept) * kept * size


def nearest_tokens(table: Array, kept: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the new id of every token: its own, or that of the kept token with the largest cosine [V].

    Args:
        table: Embeddings [V, D].
        kept: Old ids that are kept, by new id.
    """
    result = np.full(len(table), -1, np.int64)
    result[kept] = np.arange(len(kept))
    others = np.flatnonzero(result < 0)
    directions = _directions(table[kept]).T
    for start in range(0, len(others), _ROWS):
        part = others[start : start + _ROWS]
        result[part] = (_directions(table[part]) @ directions).argmax(axis=1)
    return result


def _directions(rows: Array) -> Array:
    rows = rows.astype(np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    directions: Array = rows / np.where(lengths > 0, lengths, 1)
    return directions
