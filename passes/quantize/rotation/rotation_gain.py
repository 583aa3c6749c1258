"""Whether a rotation lets the quantizer that follows lose less: tried on held-out samples before it is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from onnxslim_llm.concepts.block_weights import WeightScheme
from onnxslim_llm.ir.weights.weight import Weight
from onnxslim_llm.passes.quantize.codes.columns import columns_of
from onnxslim_llm.passes.quantize.codes.trial import held_error, lost
from onnxslim_llm.passes.quantize.folding.fold_sites import FoldSite
from onnxslim_llm.passes.quantize.rotation.rotate_step import Rotate
from onnxslim_llm.passes.quantize.rotation.rotation import Rotated, Rotation
from onnxslim_llm.products.owned_weights import Constants, Product
from onnxslim_llm.products.transform_job import transformed
from onnxslim_llm.stats.statistics import StoredMoments

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["head_errors", "relative_errors"]

#: Columns of each weight that are tried.
_COLUMNS = 1024


def relative_errors(model: Model, context: Context, schemes: Mapping[str, WeightScheme]) -> float:
    """Return the squared errors of all quantized products, each relative to the square of its result, summed up.

    Args:
        model: As it is, or rotated.
        context: Its statistics belong to the model.
        schemes: How weights will be quantized, by name; the others do not count.
    """
    constants = Constants(model)
    total = 0.0
    for node in model.graph.nodes:
        product = constants.product(node)
        if isinstance(product, Product) and product.name in schemes and context.statistics is not None:
            moments = context.statistics.of_weight(product.name)
            if moments is not None and moments.size == product.rows:
                total += _relative(product.weight, product.k_axis, schemes[product.name], moments)
    return total


def head_errors(
    model: Model, context: Context, site: FoldSite, rotation: Rotation, schemes: Mapping[str, WeightScheme]
) -> tuple[float, float]:
    """Return those of the products before and behind an attention, without and with a rotation of its values.

    Args:
        model: The model.
        context: With statistics.
        site: Of the kind "values", mixable.
        rotation: Of each head.
        schemes: As in `relative_errors`.
    """
    constants = Constants(model)
    makers = [found for maker in site.makers if isinstance(found := constants.product(maker.node), Product)]
    before = after = 0.0
    for product in (*site.products, *makers):
        moments = context.statistics.of_weight(product.name) if context.statistics is not None else None
        if product.name not in schemes or moments is None or moments.size != product.rows:
            continue
        reads = any(product is other for other in site.products)
        axis = product.k_axis if reads else 1 - product.k_axis
        rotated = transformed(product.weight, product.name, Rotate(axis, rotation))
        changed = moments.transformed(Rotated(rotation, product.rows)) if reads else moments
        before += _relative(product.weight, product.k_axis, schemes[product.name], moments)
        after += _relative(rotated, product.k_axis, schemes[product.name], changed)
    return before, after


def _relative(weight: Weight, k_axis: int, scheme: WeightScheme, moments: StoredMoments) -> float:
    columns = columns_of(weight, k_axis, _COLUMNS)
    held = moments.load().held
    assert held.gram is not None, moments.file
    signal = lost(columns, held.gram.astype(np.float32))
    return held_error(columns, scheme, moments) / signal if signal > 0 else 0.0
