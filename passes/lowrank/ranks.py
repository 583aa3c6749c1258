"""How many directions of each weight are kept: by a rule for each, or by a budget for all of them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.errors import UsageError
from onnxslim_llm.products.knapsack import Choice, choose

__all__ = ["BudgetKind", "Candidate", "break_even", "rank_for_energy", "rank_for_ratio", "share_ranks"]

Array = NDArray[Any]

BudgetKind = Literal["parameters", "bytes", "flops"]


@dataclass(frozen=True)
class Candidate:
    """A weight that may be split, or several that share their first factor.

    Attributes:
        rows: K.
        columns: N, of all of them together.
        size: What an element counts in the budget.
        energy: Squared singular values, falling: those from r on are what rank r costs.
        weight: What a unit of energy counts, compared with the other candidates.
    """

    rows: int
    columns: int
    size: int = 1
    energy: Array = field(default_factory=lambda: np.zeros(0), repr=False)
    weight: float = 1.0

    def loss(self, rank: int) -> float:
        """Return what rank r costs: its lost energy, times the share of all energy that it is.

        What an error does to the answer grows faster than its square once it is not small any more. Measured on the
        sample model, where lost energy alone shares out ranks worse than the same ratio for all, because the first
        layer's loss grows threefold while its lost energy doubles (docs/pruning.md).
        """
        tail, total = float(self.energy[rank:].sum()), float(self.energy.sum())
        return self.weight * tail * (tail / total) if total > 0 else 0.0


def break_even(rows: int, columns: int) -> int:
    """Return the largest rank whose factors are smaller than W[K, N]: the last one below K N / (K + N)."""
    return (rows * columns - 1) // (rows + columns)


def rank_for_ratio(rows: int, columns: int, ratio: float, align: int) -> int:
    """Return the largest multiple of `align` (or what comes below) that keeps `ratio` of the parameters."""
    return _aligned(max(1, int(ratio * rows * columns / (rows + columns))), align)


def rank_for_energy(energy: Array, share: float, align: int) -> int:
    """Return the least rank, rounded up to a multiple of `align`, that keeps a share of the energy."""
    kept = np.cumsum(energy)
    total = float(kept[-1]) if len(kept) else 0.0
    rank = int(np.searchsorted(kept, share * total * (1 - 1e-12))) + 1 if total > 0 else 1
    return min(-(-rank // align) * align, len(energy))


def share_ranks(candidates: Sequence[Candidate], budget: float, align: int, where: str) -> list[int | None]:
    """Return the rank of each candidate, None where it stays whole, so that the least energy is lost.

    A multiple-choice knapsack over the ranks (multiples of `align`) and the whole weight; the result is never worse
    than the same ratio for all.

    Args:
        candidates: With their spectra.
        budget: At most 1: a share of what all of them take now; above: the number itself.
        align: Ranks are multiples of this.
        where: For messages.

    Raises:
        UsageError: Not even the least ranks fit.
    """
    ranks = [[*range(align, break_even(c.rows, c.columns) + 1, align), None] for c in candidates]
    items = [[_choice(c, rank) for rank in some] for c, some in zip(candidates, ranks, strict=True)]
    whole = sum(item[-1].size for item in items)
    limit = int(budget * whole) if budget <= 1 else int(budget)
    uniform = [_at_ratio(item, limit / max(whole, 1)) for item in items]
    picked = choose(items, limit, [uniform])
    if picked is None:
        least = sum(min(choice.size for choice in item) for item in items)
        closest = f"{least / whole:.3f}" if budget <= 1 else str(least)
        what = f"budget = {budget:g} cannot be met: rank {align} for every weight still takes {closest}"
        raise UsageError(what, where=where, todo=f"give a budget of {closest} or more, or a smaller align")
    return [some[i] for some, i in zip(ranks, picked, strict=True)]


def _choice(candidate: Candidate, rank: int | None) -> Choice:
    if rank is None:
        return Choice(candidate.size * candidate.rows * candidate.columns, 0.0)
    return Choice(candidate.size * rank * (candidate.rows + candidate.columns), candidate.loss(rank))


def _at_ratio(item: Sequence[Choice], ratio: float) -> int:
    """Return the largest choice that takes at most a share of the whole weight; the smallest if there is none."""
    fitting = [i for i, choice in enumerate(item) if choice.size <= ratio * item[-1].size]
    return max(fitting, key=lambda i: item[i].size, default=0)


def _aligned(rank: int, align: int) -> int:
    return rank // align * align or rank
