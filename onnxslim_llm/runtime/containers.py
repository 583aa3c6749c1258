"""Results of ONNX Runtime that are no tensors: sequences and maps, which the operators of ai.onnx.ml like to give."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CONTAINERS", "flat_values"]

CONTAINERS = ("seq(", "map(", "optional(")
"""How ONNX Runtime begins to write the types of values that are no tensors."""


def flat_values(value: Any) -> NDArray[Any]:
    """Return the values of `value` in one vector: of maps by ascending key, of sequences one after the other.

    Args:
        value: What `InferenceSession.run` returns: an array (which stays as it is), a list, a dict, or None for an
            optional that is empty.
    """
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, dict):
        return np.asarray([value[key] for key in sorted(value)])
    if value is None or value == []:
        return np.zeros(0, np.float32)
    if isinstance(value, list):
        return np.concatenate([flat_values(item).ravel() for item in value])
    return np.asarray([value])
