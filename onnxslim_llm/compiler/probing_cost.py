"""Whether a model is small enough that a compile may run it unasked, to learn what its weights are multiplied with."""

from __future__ import annotations

import onnx

from onnxslim_llm.stats.taps import find_taps

__all__ = ["LIMIT", "probing_work", "too_much_work"]

#: Parameters of products.
LIMIT = 1.5e8


def probing_work(model: onnx.ModelProto) -> float:
    """Return the elements of all weights that products have, each counted once.

    Args:
        model: The source; its weights may be left out.
    """
    sizes = {
        tensor.name: float(tensor.dims[0] * tensor.dims[1])
        for tensor in model.graph.initializer
        if len(tensor.dims) == 2
    }
    return sum(
        sizes[name] for name in {name for tap in find_taps(model.graph) for name in tap.weights} if name in sizes
    )


def too_much_work(model: onnx.ModelProto) -> str:
    """Return why a compile should not do it without being asked to; "" if it may.

    Args:
        model: The source; its weights may be left out.
    """
    work = probing_work(model)
    if work <= LIMIT:
        return ""
    return f"{work:.3g}"
