"""How much each weight matters to what its product, or the whole model, computes."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.gradients.source import Figure

__all__ = ["FIGURES", "METHODS", "Method", "scores_of"]

Array = NDArray[Any]

Method = Literal["magnitude", "wanda", "sparsegpt", "taylor", "fisher"]
METHODS: tuple[Method, ...] = get_args(Method)

#: Methods that ask for gradients, and what they need of them.
FIGURES: dict[Method, Figure] = {"taylor": "absolute", "fisher": "squared"}


def scores_of(method: Method, weight: Array, mean_square: Array | None, figures: Array | None = None) -> Array:
    """Return what the loss of each weight costs, as far as the method sees it; float32, not negative.

    magnitude: w^2, its share in the squares of the matrix.
    wanda, sparsegpt: w_kn^2 E[x_k^2], its share in the squared output of the product; the order within a column is that
        of Wanda (Sun et al. 2023, arXiv 2306.11695), |w_kn| ||x_k||. Magnitude where there are no data.
    taylor: |w| E|g|, what the first order says of the model's loss (Molchanov et al. 2017, arXiv 1611.06440), token by
        token, in nats.
    fisher: 1/2 w^2 E[g^2], the KL divergence to second order (LeCun et al. 1989), in nats a token.

    Args:
        method: Which of them.
        weight: W [K, n].
        mean_square: E[x_k^2] [K], or None.
        figures: E|g| or E[g^2] [K, n], for the methods that need them.
    """
    if method in FIGURES:
        assert figures is not None
        size: Array = np.abs(weight) if method == "taylor" else np.float32(0.5) * np.square(weight, dtype=np.float32)
        return size * figures.astype(np.float32, copy=False)
    squares: Array = np.square(weight, dtype=np.float32)
    if method == "magnitude" or mean_square is None:
        return squares
    return squares * mean_square[:, None].astype(np.float32)
