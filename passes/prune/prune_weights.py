"""Set weights to zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_graphsurgeon as gs

from onnxslim_llm.errors import UsageError
from onnxslim_llm.gradients.source import StoredFigures
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.ir.weights.jobs import derive
from onnxslim_llm.passes.prune.zeros.allocation import Allocation, Candidate, allocate
from onnxslim_llm.passes.prune.zeros.patterns import Pattern
from onnxslim_llm.passes.prune.zeros.prune_job import Comparison, PruneJob, Request
from onnxslim_llm.passes.prune.zeros.scores import FIGURES, Method
from onnxslim_llm.products.reads import read_weight
from onnxslim_llm.products.selection import compile_patterns, matching
from onnxslim_llm.products.sites import WeightGroup, find_groups
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.stage import Stage
from onnxslim_llm.stats.statistics import Statistics, StoredMoments

__all__ = ["PruneWeights"]


@dataclass(frozen=True)
class PruneWeights(Pass):
    """Set the weights of products that matter least to zero, and fit the others again.

    The weights stay dense: `store_sparse` and kernels make use of the zeros. Embeddings and classifiers are left alone.

    Before:
        Y = MatMul (X, W)
    After:
        Y = MatMul (X, W)        (the same initializer, with zeros)

    Skips when:
        - the weight has fewer than `min_elements` elements, or a side below 16;
        - its name, or that of a node that reads it, matches `exclude`;
        - it is an embedding or makes the logits, or is read by products and look-ups alike;
        - its sides are no multiples of what the pattern takes together;
        - it is quantized already, sparse, not a matrix, or of another type than float32, float16 or bfloat16;
        - it is a graph output, or a graph input that the caller may replace.

    Attributes:
        sparsity: Share of zeros, at least 0 and below 1. "n:m" patterns fix it themselves.
        pattern: "unstructured"; "2:4", "4:8", ...: so many of so many neighbours along K are kept; "16x1", "16x16",
            ...: blocks of so many rows of K and columns.
        method: "magnitude" needs no data; "wanda" weighs magnitudes by the inputs; "sparsegpt" also makes up for every
            zero in the weights that come after it. "taylor" and "fisher" weigh them by gradients of the model's answer,
            to first and second order, and need torch. A weight that no data reach is pruned by magnitude.
        compare: Which weights compete for their places: those of a "column" of W[K, N], as Wanda's authors have it, or
            those of the "matrix" (of a range of 512 columns). For patterns that are not "unstructured" it does not
            matter.
        refit: Compute the kept weights' least-squares values, where that helps on held-out samples; needs data. By
            default it is done, but not with "magnitude".
        allocation: "uniform" prunes all weights alike; "outliers" takes less from those with more outliers (OWL, Yin et
            al. 2023, arXiv 2310.05175); "sensitivity" takes less from those whose zeros cost the answer of the model
            more, by the gradients of "taylor" and "fisher", or by measured errors (see target_bits of
            quantize_weights).
        steps: Choose the zeros in so many steps and fit after each.
        error_limit: Stop a weight before its relative output error exceeds this; 0: never. Needs data.
        min_elements: Smaller weights are left alone.
        exclude: Regular expressions; weights with a match in their own name or in that of a reader are left alone.
    """

    name: ClassVar[str] = "prune_weights"
    group: ClassVar[str] = "prune"
    lossless: ClassVar[bool] = False
    stage: ClassVar[Stage] = Stage.PRUNE

    sparsity: float = 0.5
    pattern: str = "unstructured"
    method: Method = "sparsegpt"
    compare: Comparison = "matrix"
    refit: bool | None = None
    allocation: Allocation = "uniform"
    steps: int = 1
    error_limit: float = 0.0
    min_elements: int = 4096
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            what = f"sparsity = {self.sparsity} is not possible"
            raise UsageError(what, where=self.name, todo="choose at least 0 and less than 1, such as 0.5")
        if self.steps < 1:
            raise UsageError(f"steps = {self.steps} is not possible", where=self.name, todo="choose 1 or more")
        if self.error_limit < 0:
            raise UsageError(f"error_limit = {self.error_limit} is negative", where=self.name)
        pattern = Pattern.parse(self.pattern, f"{self.name}.pattern")
        if pattern.group and self.allocation != "uniform":
            what = f"allocation = {self.allocation} cannot be had with '{self.pattern}', which fixes the sparsity"
            raise UsageError(what, where=self.name, todo="use allocation=uniform")
        compile_patterns(self.exclude, f"{self.name}.exclude")

    @property
    def wants_statistics(self) -> bool:
        """Whether calibration data are needed."""
        return self.method != "magnitude" or self.allocation != "uniform" or bool(self.refit or self.error_limit)

    @property
    def wants_gains(self) -> bool:
        """Whether the calibration must say what errors do to the model's answer."""
        return self.allocation == "sensitivity" and self.method not in FIGURES

    def requires(self, model: Model, context: Context) -> None:
        """Check that there are data where they are needed, and torch.

        Raises:
            UsageError: There are no data.
            ResourceError: There is no torch.
        """
        if self.wants_statistics:
            what = "these options need calibration data"
            context.need_statistics(what, self.name, "use method=magnitude alone")
        if self.method in FIGURES:
            what = f"method={self.method} needs gradients of the model's answer"
            context.need_gradients(what, self.name, "use method=sparsegpt")

    def apply(self, model: Model, context: Context) -> Change:
        """Record the work; it is done at save."""
        change = Change()
        infer_shapes(model)
        chosen = self._choose(model, change)
        if not chosen:
            return change
        pattern = Pattern.parse(self.pattern, self.name)
        overall = self.sparsity if pattern.sparsity is None else pattern.sparsity
        candidates = self._candidates(model, chosen, context, change)
        shares = allocate(self.allocation, candidates, overall)
        refit = self.method != "magnitude" if self.refit is None else self.refit
        tensors = []
        for known, sparsity in zip(candidates, shares, strict=True):
            group = known.group
            request = Request(sparsity, pattern, known.method, self.compare, refit, self.steps, self.error_limit)
            (pruned,) = derive(PruneJob(group.source, group.k_axis, request, group.name, known.moments, known.figures))
            for constant in _constants(group):
                constant.values = pruned
            change.sites.append(group.name)
            tensors.append({"name": group.name, "shape": list(group.source.shape), "sparsity": round(sparsity, 4)})
        size = sum(group.source.size for group in chosen)
        zeros = sum(group.source.size * share for group, share in zip(chosen, shares, strict=True))
        change.detail.update(sparsity=round(zeros / size, 4), pattern=self.pattern, tensors=tensors)
        return change

    def _choose(self, model: Model, change: Change) -> list[WeightGroup]:
        exclude = compile_patterns(self.exclude, self.name)
        pattern = Pattern.parse(self.pattern, self.name)
        chosen = []
        for group in find_groups(model, change):
            found, refusal = matching(exclude, group), pattern.refusal(group.rows, group.columns)
            if found:
                change.skip(group.name, f"it is excluded by '{found}'")
            elif group.roles != {"linear"}:
                what = "used in several ways" if len(group.roles) > 1 else "an embedding or makes the logits"
                change.skip(group.name, f"it is {what}: every zero would show in every token")
            elif group.source.size < self.min_elements:
                change.skip(group.name, f"{group.source.size} elements, fewer than min_elements = {self.min_elements}")
            elif refusal:
                change.skip(group.name, refusal)
            else:
                chosen.append(group)
        return chosen

    def _candidates(self, model: Model, chosen: list[WeightGroup], context: Context, change: Change) -> list[Candidate]:
        """Return the weights with what is known about each.

        Raises:
            ModelError: An operator has no gradient.
        """
        statistics = context.statistics
        figures: Mapping[str, StoredFigures] = {}
        if self.method in FIGURES and context.gradients is not None:
            figures = context.gradients.figures(model, [group.name for group in chosen], FIGURES[self.method])
        found = []
        for group in chosen:
            moments = self._moments(group, statistics)
            own = figures.get(group.name)
            method = self.method if moments is not None or own is not None else "magnitude"
            if method != self.method:
                change.skip(group.name, "no calibration data reach it: pruned by magnitude")
            gain = statistics.gains.get(statistics.origin_of(group.name)) if statistics is not None else None
            found.append(Candidate(group, method, moments, own, None if gain is None else gain.per_square))
        return found

    @staticmethod
    def _moments(group: WeightGroup, statistics: Statistics | None) -> StoredMoments | None:
        moments = statistics.of_weight(group.name) if statistics is not None else None
        return moments if moments is not None and moments.size == group.rows else None


def _constants(group: WeightGroup) -> list[gs.Constant]:
    """Return the initializers that hold the weight: tied ones may be several."""
    found: dict[int, Any] = {}
    for site in group.sites:
        read = read_weight(site.node.inputs[1])
        assert read is not None, site.node.name
        found[id(read.constant)] = read.constant
    return list(found.values())
