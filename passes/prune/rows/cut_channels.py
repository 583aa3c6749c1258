"""Leave out hidden channels: columns in what makes them, entries on the way, rows in what sums them."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.weights import constant, weight_of
from onnxslim_llm.ir.weights.weight import Weight
from onnxslim_llm.passes.prune.rows.select_job import selected
from onnxslim_llm.products.hidden import HiddenLayer

__all__ = ["cut_channels"]


def cut_channels(model: Model, layer: HiddenLayer, kept: NDArray[np.int64], weight: Weight | None = None) -> None:
    """Keep some channels of a hidden layer; shapes have to be inferred again afterwards.

    Args:
        model: The model.
        layer: The layer.
        kept: Channels, in the new order.
        weight: Of the product that sums them; default: the rows of its weight that are left.
    """
    parts: dict[int, tuple[gs.Constant, int, list[NDArray[np.int64]]]] = {}
    for maker in layer.makers:
        _, _, places = parts.setdefault(id(maker.constant), (maker.constant, maker.axis, []))
        places.append(kept + maker.offset)
    for tensor, axis, places in parts.values():
        tensor.values = selected(weight_of(tensor), axis, np.concatenate(places), tensor.name)
    name = layer.weight.name
    layer.weight.values = weight or selected(weight_of(layer.weight), layer.k_axis, kept, name)
    for split in layer.splits:
        if len(split.inputs) > 1:
            sizes = np.array([len(kept)] * len(split.outputs), np.int64)
            split.inputs[1] = constant(model.fresh_name(f"{split.name}/sizes"), sizes)
    for activation in layer.tensors:
        activation.shape = None
