"""How much each weight matters to what its product computes."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

__all__ = ["METHODS", "Method", "scores_of"]

Array = NDArray[Any]

Method = Literal["magnitude", "wanda", "sparsegpt"]
METHODS: tuple[Method, ...] = get_args(Method)


def scores_of(weight: Array, mean_square: Array | None) -> Array:
    """Return the squared share of each weight in the output of its product.

    Without data it is w^2. With them it is w_kn^2 E[x_k^2], whose order within a column is that of Wanda (Sun et al.
    2023, arXiv 2306.11695): |w_kn| ||x_k||.

    Args:
        weight: W [K, n].
        mean_square: E[x_k^2] [K], or None.
    """
    squares: Array = np.square(weight, dtype=np.float32)
    return squares if mean_square is None else squares * mean_square[:, None].astype(np.float32)
