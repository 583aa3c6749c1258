"""What a norm hands on: its scale and bias say how large each channel of the next product's input is."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.rewrite.constants import constant_tensor
from onnxslim_llm.rewrite.schema import normal_domain

__all__ = ["norm_of"]

Array = NDArray[Any]

#: (domain, operator) -> inputs with the scale and the bias; -1 where there is none.
_NORMS = {
    ("", "RMSNormalization"): (1, -1),
    ("", "LayerNormalization"): (1, 2),
    ("", "SimplifiedLayerNormalization"): (1, -1),
    ("com.microsoft", "SimplifiedLayerNormalization"): (1, -1),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): (2, -1),
    ("com.microsoft", "SkipLayerNormalization"): (2, 3),
}


def norm_of(tensor: gs.Tensor) -> tuple[Array, Array] | None:
    """Return scale and bias [K] of the norm that makes a tensor; None if no norm over its last axis does."""
    if not isinstance(tensor, gs.Variable) or len(tensor.inputs) != 1:
        return None
    node = tensor.inputs[0]
    places = _NORMS.get((normal_domain(node.domain), node.op))
    if places is None or tensor is not node.outputs[0]:
        return None
    scale, bias = (_vector(node, place) for place in places)
    if scale is None:
        return None
    return (scale, np.zeros_like(scale)) if bias is None or bias.shape != scale.shape else (scale, bias)


def _vector(node: gs.Node, place: int) -> Array | None:
    found = constant_tensor(node.inputs[place]) if 0 <= place < len(node.inputs) else None
    if found is None or len(weight_of(found).shape) != 1:
        return None
    return np.asarray(weight_of(found).load(), np.float64)
