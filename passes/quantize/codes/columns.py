"""Some columns of a weight, to try things out on."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.ir.weights import Weight

__all__ = ["columns_of"]

Array = NDArray[Any]


def columns_of(weight: Weight, k_axis: int, count: int) -> Array:
    """Return up to `count` columns of W[K, N], spread evenly, as rows [n, K] in float32.

    Columns are quantized independently of each other, so that some of them say how all of them fare.
    """
    view = weight.view()
    matrix = view.T if k_axis == 0 else view
    index = np.unique(np.linspace(0, len(matrix) - 1, min(count, len(matrix))).round().astype(np.int64))
    result = np.ascontiguousarray(matrix[index], dtype=np.float32)
    weight.release()
    return result
