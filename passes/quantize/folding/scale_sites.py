"""What passes have in common that scale channels wherever that costs no node: the way through the sites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from onnxslim_llm.errors import UsageError
from onnxslim_llm.passes.quantize.folding.fold_scales import fold_scales
from onnxslim_llm.passes.quantize.folding.fold_sites import FoldSite, find_fold_sites
from onnxslim_llm.rewrite.passes import Change, Pass

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.products.owned_weights import Product
    from onnxslim_llm.rewrite.context import Context
    from onnxslim_llm.stats.statistics import StoredMoments

__all__ = ["ScaleSites", "Scaling", "moments_of"]


@dataclass(frozen=True)
class Scaling:
    """Factors for a site that have shown what they are good for.

    Attributes:
        factor: s [K]; the input is divided by it.
        detail: What the manifest says of it.
    """

    factor: NDArray[Any]
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScaleSites(Pass):
    """Base of these passes, with the options that they share.

    Attributes:
        grid: Steps of the exponent between 0 and 1.
        values: Scale the values of attentions, too.
        min_gain: Share by which the error must fall.
    """

    grid: int = 20
    values: bool = True
    min_gain: float = 0.01

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise UsageError(f"grid must be 1 or more, not {self.grid}", where=self.name)

    @property
    def wants_statistics(self) -> bool:
        """It works from the moments of the inputs."""
        return True

    def scale_sites(self, model: Model, context: Context, choose: Callable[[FoldSite], Scaling | str]) -> Change:
        """Scale the sites of the top graph.

        Args:
            model: The model.
            context: Its statistics follow what is scaled.
            choose: Returns the factors of a site, or why it stays.
        """
        change = Change(detail={"inputs": []})
        for site in find_fold_sites(model, change):
            if site.kind == "values" and not self.values:
                change.skip(site.where, "it is the result of an attention, and `values` is off")
                continue
            chosen = choose(site)
            if isinstance(chosen, str):
                change.skip(site.where, chosen)
                continue
            fold_scales(model, context, site, chosen.factor)
            change.sites.append(site.where)
            change.detail["inputs"].append({"name": site.where, "made_by": site.kind, **chosen.detail})
        return change


def moments_of(product: Product, context: Context) -> StoredMoments | str:
    """Return the moments of a product's input, or that there are none."""
    assert context.statistics is not None
    moments = context.statistics.of_weight(product.name)
    if moments is None or moments.size != product.rows:
        return "no calibration data reach it"
    return moments
