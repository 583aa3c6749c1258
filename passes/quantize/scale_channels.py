"""Scale the channels that the data are large in, so that few-bit weights are finer there (AWQ)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from onnxslim_llm.errors import UsageError
from onnxslim_llm.passes.quantize.codes.columns import columns_of
from onnxslim_llm.passes.quantize.codes.trial import held_error
from onnxslim_llm.passes.quantize.folding.channel_scales import Columns, best_candidate, candidates
from onnxslim_llm.passes.quantize.folding.fold_scales import tied
from onnxslim_llm.passes.quantize.folding.fold_sites import FoldSite
from onnxslim_llm.passes.quantize.folding.following import following_quantizer
from onnxslim_llm.passes.quantize.folding.scale_sites import ScaleSites, Scaling, moments_of
from onnxslim_llm.rewrite.passes import Change
from onnxslim_llm.rewrite.stage import Stage
from onnxslim_llm.stats.transforms import Scaled

if TYPE_CHECKING:
    from onnxslim_llm.concepts.block_weights import WeightScheme
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["ScaleChannels"]

#: Columns n that a candidate is tried on, as n K / N: the product of H with them then takes about as long as rounding
#: the whole weight to the nearest codes. And the least of them.
_TRIED, _TRIED_LEAST = 64, 32
#: Columns on which the winner has to show, with the quantizer that follows, that it is better than nothing.
_JUDGED = 1024


@dataclass(frozen=True)
class ScaleChannels(ScaleSites):
    """Multiply the rows of weights by factors that suit the calibration data, and divide what makes their input (AWQ).

    With factors that grow with the size of a channel, the weights of large channels get finer codes. The division is
    folded into the weight of the norm before the products, the columns of the product before them (up to down, through
    the product with the gate), or the columns that make the values of an attention: no node is added. The factors are
    searched on the samples that codes are fitted to, and are kept only where the quantize_weights that follows makes a
    smaller error with them on the samples that were held out.

    Before:
        x = onnxslim_llm.RMSNorm <epsilon> (h, g)
        y = MatMul (x, W)
    After:
        x = onnxslim_llm.RMSNorm <epsilon> (h, g_divided_by_s)
        y = MatMul (x, s_times_W)

    Skips when:
        - the error of the quantizer that follows does not fall on samples that were held out;
        - no quantized product reads the input, or no calibration data reach it;
        - the input is read by something else than products, too, or is an output of the model;
        - what makes it is no norm over the last axis, product or fused attention with a weight of its own;
        - a weight is used elsewhere, too, is an input or output of the model, or no dense float matrix;
        - `values` is off and the input is the result of an attention.

    Attributes:
        grid: Steps of the exponent between 0 and 1.
        values: Scale the values of attentions, too. What a KV cache holds of them is scaled then: caches cannot be
            exchanged with the source model.
        min_gain: Share by which the error must fall.
    """

    name: ClassVar[str] = "scale_channels"
    group: ClassVar[str] = "quantize"
    stage: ClassVar[Stage] = Stage.FOLD

    def requires(self, model: Model, context: Context) -> None:
        """Check that there are data, and a quantizer to prepare for.

        Raises:
            UsageError: One of them is missing.
        """
        context.need_statistics("channels are scaled by calibration data, and there are none", self.name)
        if following_quantizer(context) is None:
            todo = "put quantize_weights after it: the factors are chosen for its bits and blocks"
            raise UsageError("no quantize_weights follows", where=self.name, todo=todo)

    def apply(self, model: Model, context: Context) -> Change:
        """Scale all sites of the top graph where that helps."""
        quantizer = following_quantizer(context)
        assert quantizer is not None
        schemes = quantizer.plan(model, context)
        return self.scale_sites(model, context, lambda site: self._choose(context, site, schemes))

    def _choose(self, context: Context, site: FoldSite, schemes: dict[str, WeightScheme]) -> Scaling | str:
        """Return the factors of a site, or why it stays."""
        coded = [product for product in site.products if product.name in schemes]
        if not coded:
            return "no quantized product reads it"
        moments = moments_of(coded[0], context)
        if isinstance(moments, str):
            return moments
        columns = [Columns(columns_of(p.weight, p.k_axis, _JUDGED), schemes[p.name], p.columns) for p in coded]
        tried = [_some(part) for part in columns]
        fit = moments.load().fit
        choices = candidates(fit.mean_absolute, [part.rows for part in tried], self.grid, partial(tied, site))
        best, _, _ = best_candidate(tried, fit, choices)
        if best is None:
            return "no factors make the error smaller"
        scaled = moments.transformed(Scaled(1 / best.factor))
        factor = best.factor.astype(np.float32)
        before = sum(part.times * held_error(part.rows, part.scheme, moments) for part in columns)
        after = sum(part.times * held_error(part.rows * factor, part.scheme, scaled) for part in columns)
        if not after < before * (1 - self.min_gain):
            ratio = after / before if before else 1.0
            return f"on samples that were held out the error becomes {ratio:.3f} times what it is"
        detail = {"exponent": best.exponent, "by_weight": best.by_weight, "error_ratio": round(after / before, 4)}
        return Scaling(best.factor, detail)


def _some(part: Columns) -> Columns:
    """Return the columns to try candidates on."""
    count, size = part.rows.shape
    wanted = min(count, max(_TRIED_LEAST, _TRIED * part.total // size))
    return Columns(part.rows[:: -(-count // wanted)], part.scheme, part.total)
