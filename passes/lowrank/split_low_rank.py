"""Split weights into two thin matrices."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.ir.weights.jobs import derive
from onnxslim_llm.passes.lowrank.factor_job import FactorJob, Method, matrix_of, whitening_of
from onnxslim_llm.passes.lowrank.ranks import (
    BudgetKind,
    Candidate,
    break_even,
    rank_for_energy,
    rank_for_ratio,
    share_ranks,
)
from onnxslim_llm.passes.lowrank.split_nodes import split_products
from onnxslim_llm.products.selection import compile_patterns, matching
from onnxslim_llm.products.sites import WeightGroup, find_groups
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.stage import Stage
from onnxslim_llm.stats.factored import Through
from onnxslim_llm.stats.whitened import spectrum

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.ir.weights.weight import Weight
    from onnxslim_llm.rewrite.context import Context
    from onnxslim_llm.stats.statistics import Statistics, StoredMoments

__all__ = ["SplitLowRank"]

Array = NDArray[Any]

#: What the weights are asked to keep where no rule is given.
_BUDGET = 0.8
_TINY = 1e-30


@dataclass(frozen=True)
class _Unit:
    """Weights that are split together: one, or several that share the first factor."""

    groups: tuple[WeightGroup, ...]
    moments: StoredMoments | None

    @property
    def name(self) -> str:
        return self.groups[0].name

    @property
    def rows(self) -> int:
        return self.groups[0].rows

    @property
    def columns(self) -> int:
        return sum(group.columns for group in self.groups)

    @property
    def sources(self) -> list[tuple[Weight, int]]:
        return [(group.source, group.k_axis) for group in self.groups]


@dataclass(frozen=True)
class SplitLowRank(Pass):
    """Replace the product with a weight W[K, N] by products with two thin matrices A[K, r] and B[r, N], A B ~ W.

    Parameters, bytes and multiplications shrink from K N to r (K + N), in every runtime. A B is the best matrix of its
    rank for the inputs of calibration data: the truncated singular value decomposition, whitened by H = X^T X. The
    ranks are shared out over the weights so that all together lose least. The factors are weights like others: they can
    be quantized afterwards, with statistics of their own inputs.

    Before:
        Y = MatMul (X, W)
    After:
        T = MatMul (X, W_A)
        Y = MatMul (T, W_B)

    Skips when:
        - the rank is not less than K N / (K + N), where the factors would be larger than the weight;
        - `rank` is more than min(K, N);
        - no calibration data reach the weight, unless `method` is svd;
        - it is an embedding or makes the logits, or is read by products and look-ups alike, or along both axes;
        - it has fewer than `min_elements` elements, or a side below 16;
        - its name, or that of a node that reads it, matches `exclude`;
        - it is quantized already, sparse, not a matrix, or of another type than float32, float16 or bfloat16;
        - it is a graph output, or a graph input that the caller may replace.

    Attributes:
        rank: This rank for every weight; 0 leaves it to another rule. One rule at most may be given.
        ratio: Share of each weight's parameters that its factors may have, below 1.
        energy: Share of each weight's squared (whitened) singular values to keep.
        error: Relative output error that each weight may get: sqrt(1 - kept energy).
        budget: What all weights together may keep, as a share of what they take now, or above 1 as a number. Ranks are
            shared out so that least is lost: expected KL divergence if there are calibration data, else energy relative
            to each weight's, both times the share that is lost. This is the rule if no other is given.
        budget_of: "parameters"; "bytes", where element types differ; "flops", multiplications of a token, where a
            weight with two readers counts twice.
        method: "whitened" (SVD-LLM) needs calibration data, and so does "asvd", which weighs channels by the root of
            mean |x|; "svd" needs none, and is much worse.
        shared: Weights that read one tensor (query, key and value; gate and up) get one A together: the better use of
            parameters on the decoders measured (docs/pruning.md).
        align: Ranks that a rule computes are multiples of this.
        min_elements: Smaller weights are left alone.
        exclude: Regular expressions; weights with a match in their own name or in that of a reader are left alone.
    """

    name: ClassVar[str] = "split_low_rank"
    group: ClassVar[str] = "lowrank"
    lossless: ClassVar[bool] = False
    stage: ClassVar[Stage] = Stage.SPLIT

    rank: int = 0
    ratio: float = 0.0
    energy: float = 0.0
    error: float = 0.0
    budget: float = 0.0
    budget_of: BudgetKind = "parameters"
    method: Method = "whitened"
    shared: bool = True
    align: int = 8
    min_elements: int = 4096
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = self.name
        if self.rank < 0:
            todo = "choose a rank from 1 to min(K, N)"
            raise UsageError(f"rank = {self.rank} is not possible", where=where, todo=todo)
        for option in ("ratio", "energy", "error"):
            value = getattr(self, option)
            if not 0 <= value < 1:
                todo = "choose more than 0 and less than 1, or 0 to leave it to another rule"
                raise UsageError(f"{option} = {value:g} is not possible", where=where, todo=todo)
        if self.budget < 0:
            todo = "give a share, such as 0.8, or a number above 1"
            raise UsageError(f"budget = {self.budget:g} is not possible", where=where, todo=todo)
        if self.align < 1:
            raise UsageError(f"align = {self.align} is not possible", where=where, todo="choose 1 or more")
        rules = [option for option in ("rank", "ratio", "energy", "error", "budget") if getattr(self, option)]
        if len(rules) > 1:
            what = f"{' and '.join(rules)} are rules for the same ranks"
            raise UsageError(what, where=where, todo="give one of them and set the others to 0")
        compile_patterns(self.exclude, f"{where}.exclude")

    @property
    def wants_statistics(self) -> bool:
        """Whether calibration data are needed."""
        return self.method != "svd"

    @property
    def _shares_out(self) -> bool:
        return not (self.rank or self.ratio or self.energy or self.error)

    @property
    def wants_gains(self) -> bool:
        """Whether ranks are shared out by what errors do to the answer."""
        return self.method == "whitened" and self._shares_out

    def requires(self, model: Model, context: Context) -> None:
        """Check that there are data where they are needed.

        Raises:
            UsageError: There are none.
        """
        if self.wants_statistics:
            what = f"method '{self.method}' needs calibration data"
            context.need_statistics(what, self.name, "set method=svd, which loses much more")

    def apply(self, model: Model, context: Context) -> Change:
        """Choose the ranks and split the products; the factors are computed at save.

        Raises:
            UsageError: The budget cannot be met.
            ModelError: A weight holds NaN or infinite values.
        """
        change = Change()
        infer_shapes(model)
        units = self._units(self._choose(model, change), context.statistics, change)
        if not units:
            return change
        entries, before, after = [], 0, 0
        for unit, (rank, kept) in zip(units, self._ranks(units, context.statistics), strict=True):
            whole = unit.rows * unit.columns
            before += whole
            reason = self._useless(unit, rank)
            if reason or rank is None:
                after += whole
                for group in unit.groups:
                    change.skip(group.name, reason or "the budget leaves it whole")
                continue
            taken = rank * (unit.rows + unit.columns)
            after += taken
            self._split(model, unit, rank, context)
            change.sites.extend(group.name for group in unit.groups)
            entry = {"name": unit.name, "shape": [unit.rows, unit.columns], "rank": rank, "parameters": [whole, taken]}
            if len(unit.groups) > 1:
                entry["shared_by"] = [group.name for group in unit.groups]
            if kept is not None:
                entry["kept_energy"] = round(kept, 6)
            entries.append(entry)
        change.detail.update(parameters=[before, after], method=self.method, tensors=entries)
        return change

    def _split(self, model: Model, unit: _Unit, rank: int, context: Context) -> None:
        factors = derive(FactorJob(unit.sources, rank, self.method, unit.moments, unit.name))
        for left, *rights in split_products(model, unit.groups, factors):
            if context.statistics is None:
                continue
            for group, right in zip(unit.groups, rights, strict=True):
                context.statistics = context.statistics.changed(right, Through(factors[0]), origin=group.name)
            context.statistics = context.statistics.changed(left, origin=unit.name)

    def _useless(self, unit: _Unit, rank: int | None) -> str:
        """Return why a rank is none that a weight could have."""
        if rank is None:
            return ""
        most, limit = min(unit.rows, unit.columns), break_even(unit.rows, unit.columns)
        if self.rank > most:
            return f"rank {self.rank} is more than min(K, N) = {most}"
        if rank > limit:
            return f"rank {rank}: from {limit + 1} on, factors are no smaller than the weight"
        return ""

    def _ranks(self, units: Sequence[_Unit], statistics: Statistics | None) -> list[tuple[int | None, float | None]]:
        """Return each unit's rank, None for one that stays whole, and the share of energy that it keeps, if known."""
        if self.rank:
            return [(self.rank, None) for _ in units]
        if self.ratio:
            return [(rank_for_ratio(u.rows, u.columns, self.ratio, self.align), None) for u in units]
        spectra = [spectrum(matrix_of(u.sources, u.name), whitening_of(self.method, u.moments)) for u in units]
        ranks: list[int | None]
        if self._shares_out:
            candidates = [self._candidate(u, s, statistics) for u, s in zip(units, spectra, strict=True)]
            ranks = share_ranks(candidates, self.budget or _BUDGET, self.align, self.name)
        else:
            share = self.energy or 1 - self.error**2
            ranks = [rank_for_energy(s, share, self.align) for s in spectra]
        return [(r, float(s[:r].sum() / max(s.sum(), _TINY))) for r, s in zip(ranks, spectra, strict=True)]

    def _candidate(self, unit: _Unit, energy: Array, statistics: Statistics | None) -> Candidate:
        size = 1
        if self.budget_of == "bytes":
            size = unit.groups[0].source.dtype.itemsize
        elif self.budget_of == "flops":
            size = len(unit.groups[0].sites)
        gains = [statistics.gains.get(statistics.origin_of(g.name)) if statistics else None for g in unit.groups]
        known = [gain.per_square for gain in gains if gain is not None and not gain.of_table]
        if self.method == "whitened" and unit.moments is not None and len(known) == len(unit.groups):
            weight = float(np.mean(known)) / max(unit.moments.count, 1)
        else:
            weight = 1 / max(float(energy.sum()), _TINY)
        return Candidate(unit.rows, unit.columns, size, energy, weight)

    def _units(self, groups: Sequence[WeightGroup], statistics: Statistics | None, change: Change) -> list[_Unit]:
        """Return what is split together; what no data reach is left out."""
        together: dict[Hashable, list[WeightGroup]] = defaultdict(list)
        moments: dict[Hashable, StoredMoments | None] = {}
        for group in groups:
            found = statistics.of_weight(group.name) if statistics is not None and self.method != "svd" else None
            if self.method != "svd" and (found is None or found.size != group.rows):
                change.skip(group.name, "no calibration data reach it: its directions are all alike")
                continue
            key = self._input(group) if self.shared else None
            key = key or id(group)
            together[key].append(group)
            moments.setdefault(key, found)
        return [_Unit(tuple(members), moments[key]) for key, members in together.items()]

    @staticmethod
    def _input(group: WeightGroup) -> Hashable:
        """Return what weights must have in common to share A, None where a weight shares with none."""
        if len(group.sites) != 1:
            return None
        (site,) = group.sites
        return (id(site.node.inputs[0]), id(site.graph), group.source.onnx_dtype, site.computes_in)

    def _choose(self, model: Model, change: Change) -> list[WeightGroup]:
        exclude = compile_patterns(self.exclude, self.name)
        found = find_groups(model, change)
        uses = Counter(group.source.key for group in found)
        chosen = []
        for group in found:
            pattern = matching(exclude, group)
            if pattern:
                change.skip(group.name, f"it is excluded by '{pattern}'")
            elif group.roles != {"linear"}:
                what = "used in several ways" if len(group.roles) > 1 else "an embedding or makes the logits"
                change.skip(group.name, f"it is {what}: no direction of it can be spared")
            elif uses[group.source.key] > 1:
                change.skip(group.name, "it is read along both axes: it would be stored twice")
            elif group.source.size < self.min_elements:
                change.skip(group.name, f"{group.source.size} elements, fewer than min_elements = {self.min_elements}")
            else:
                chosen.append(group)
        return chosen
