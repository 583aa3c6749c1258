"""Factors for the input channels of products, folded into the constants around them, and noted for later passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.passes.quantize.folding.fold_sites import FoldSite
from onnxslim_llm.products.owned_weights import Constants
from onnxslim_llm.products.transform_job import Scale
from onnxslim_llm.stats.transforms import Scaled

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["fold_scales", "tied"]

Array = NDArray[Any]


def tied(site: FoldSite, factor: Array) -> Array:
    """Return positive factors [K], equal where channels come from one channel of the maker: their geometric mean."""
    count = np.bincount(site.channels)
    mean = np.exp(np.bincount(site.channels, np.log(factor)) / count)
    result: Array = mean[site.channels]
    return result


def fold_scales(model: Model, context: Context, site: FoldSite, factor: Array) -> None:
    """Multiply the rows of a site's weights, and divide what makes its input.

    Args:
        model: The model.
        context: Its statistics and ranges of caches are changed to what they will be.
        site: Where.
        factor: s [K], as `tied` returns it.
    """
    constants = Constants(model)
    inverse = 1 / factor
    made = np.ones(int(site.channels.max()) + 1)
    made[site.channels] = inverse
    for product in site.products:
        product.change(Scale(product.k_axis, factor))
        if context.statistics is not None:
            context.statistics = context.statistics.changed(product.name, Scaled(inverse))
    for maker in site.makers:
        constants.change(maker.node, maker.index, Scale(maker.axis, made))
    if site.cache and context.cache_ranges is not None and site.cache in context.cache_ranges:
        ranges = context.cache_ranges[site.cache]
        context.cache_ranges = {**context.cache_ranges, site.cache: ranges * made.reshape(ranges.shape)}
