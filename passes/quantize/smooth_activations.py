"""Even out the channels of activations before they are rounded to integers (SmoothQuant)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.concepts.block_weights import WeightScheme
from onnxslim_llm.errors import UsageError
from onnxslim_llm.passes.quantize.codes.columns import columns_of
from onnxslim_llm.passes.quantize.codes.trial import lost, quickly_coded
from onnxslim_llm.passes.quantize.folding.channel_scales import Columns, candidates
from onnxslim_llm.passes.quantize.folding.fold_scales import tied
from onnxslim_llm.passes.quantize.folding.fold_sites import FoldSite
from onnxslim_llm.passes.quantize.folding.scale_sites import ScaleSites, Scaling, moments_of
from onnxslim_llm.rewrite.passes import Change
from onnxslim_llm.rewrite.stage import Stage
from onnxslim_llm.stats.moments import Moments

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["SmoothActivations", "rounding_error"]

Array = NDArray[Any]

#: Columns of each weight that are tried.
_COLUMNS = 256
_BITS = (4, 8, 16)


@dataclass(frozen=True)
class SmoothActivations(ScaleSites):
    """Divide channels of activations by factors that make them alike, and multiply the weights behind (SmoothQuant).

    One scale for a whole activation is as coarse as its largest channel wants it. The factors are
    max|x_j|^a / max|w_j|^(1 - a), and the exponent a of each input is the one with the least error: of rounding the
    activation with one scale, as its maxima say, and of rounding the weights with a scale per column, as H says. It is
    kept only if the error on the samples that were held out falls. The division is folded into the weight of the norm
    before the products, the columns of the product before them, or those that make the values of an attention: no node
    is added.

    Before:
        x = onnxslim_llm.RMSNorm <epsilon> (h, g)
        y = MatMul (x, W)
    After:
        x = onnxslim_llm.RMSNorm <epsilon> (h, g_divided_by_s)
        y = MatMul (x, s_times_W)

    Skips when:
        - the error of both roundings does not fall on samples that were held out;
        - no calibration data reach the input;
        - the input is read by something else than products, too, or is an output of the model;
        - what makes it is no norm over the last axis, product or fused attention with a weight of its own;
        - a weight is used elsewhere, too, is an input or output of the model, or no dense float matrix;
        - `values` is off and the input is the result of an attention.

    Attributes:
        grid: Steps of the exponent between 0 and 1.
        values: Scale the values of attentions, too. What a KV cache holds of them is scaled then: caches cannot be
            exchanged with the source model.
        min_gain: Share by which the error must fall.
        activation_bits: Width of the integers that activations will be rounded to: 4, 8 or 16.
        weight_bits: That of weights: 4 or 8.
    """

    name: ClassVar[str] = "smooth_activations"
    group: ClassVar[str] = "quantize"
    stage: ClassVar[Stage] = Stage.FOLD

    min_gain: float = 0.02
    activation_bits: int = 8
    weight_bits: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, allowed in (("activation_bits", _BITS), ("weight_bits", _BITS[:2])):
            if getattr(self, option) not in allowed:
                what = f"{option} = {getattr(self, option)} is not possible"
                raise UsageError(what, where=self.name, todo=f"choose one of {', '.join(map(str, allowed))}")

    def requires(self, model: Model, context: Context) -> None:
        """Check that there are data.

        Raises:
            UsageError: There are none.
        """
        context.need_statistics("channels are evened out by calibration data: there are none", self.name)

    def apply(self, model: Model, context: Context) -> Change:
        """Smooth all sites of the top graph where that helps."""
        return self.scale_sites(model, context, lambda site: self._choose(context, site))

    def _choose(self, context: Context, site: FoldSite) -> Scaling | str:
        """Return the factors of a site, or why it stays."""
        moments = moments_of(site.products[0], context)
        if isinstance(moments, str):
            return moments
        scheme = WeightScheme(self.weight_bits, 0, symmetric=True, method="rtn")
        columns = [Columns(columns_of(p.weight, p.k_axis, _COLUMNS), scheme, p.columns) for p in site.products]
        collected = moments.load()
        largest = np.maximum(collected.fit.largest, collected.held.largest)
        reach = [np.abs(part.rows).max(axis=0, keepdims=True) for part in columns]

        def error(of: Moments, factor: Array) -> float:
            return rounding_error(columns, of, largest, factor, self.activation_bits)

        choices = candidates(largest, reach, self.grid, partial(tied, site), always_by_weight=True)
        best = min(choices, key=lambda choice: error(collected.fit, choice.factor))
        before = error(collected.held, np.ones(moments.size))
        after = error(collected.held, best.factor)
        ratio = after / before if before else 1.0
        if not ratio < 1 - self.min_gain:
            return f"on samples that were held out the error of both roundings becomes {ratio:.3f} times what it is"
        return Scaling(best.factor, {"exponent": best.exponent, "error_ratio": round(ratio, 4)})


def rounding_error(columns: Sequence[Columns], moments: Moments, largest: Array, factor: Array, bits: int) -> float:
    """Return the squared error in x W when x / s is rounded with one scale and s W as its scheme says.

    The errors of rounding activations are taken as evenly spread over a step and independent of each other, so that
    those of a row x sum up to step^2 / 12 times the squares of the weights. What is much smaller than a step becomes 0:
    no channel loses more than its own mean square.

    Args:
        columns: Of all products of x.
        moments: Of x, with H.
        largest: Maximum of |x| by channel [K].
        factor: s [K].
        bits: Width of the codes of activations.
    """
    assert moments.gram is not None
    gram = moments.gram.astype(np.float32)
    step = 2 * float((largest / factor).max()) / (2**bits - 1)
    spread = np.minimum(step**2 / 12, moments.mean_square / factor**2)
    up, down = factor.astype(np.float32), (1 / factor).astype(np.float32)
    total = 0.0
    for part in columns:
        scaled = part.rows * up
        of_activations = moments.count * float(spread @ np.square(scaled, dtype=np.float64).sum(axis=0))
        of_weights = lost(part.rows - quickly_coded(scaled, part.scheme, moments.mean_square) * down, gram)
        total += part.times * (of_activations + of_weights)
    return total
