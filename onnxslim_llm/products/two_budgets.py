"""One choice for every item, so that the costs are least within two budgets, such as bytes and seconds.

Each budget has a price. With prices given, the best choice of an item is the one with the least cost + price x size,
for both budgets, whatever the other items get (Lagrangian relaxation; Everett, Operations Research 11, 1963). For
several ratios of the two prices the lowest ones are looked for with which everything fits. What is a little too large
just below them is made to fit by single changes, the cheapest for the excess first; what the best of all these
assignments leave of the budgets is filled by single changes, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Use", "choose_within"]

Array = NDArray[Any]

#: Ratios of the two prices that are tried, from the first budget alone to the second alone.
_RATIOS = 33
#: Halvings of the range of prices, in powers of two: as fine as double precision tells costs apart.
_HALVINGS = 60
_PRICES = (-120.0, 120.0)
#: Assignments, the cheapest ones first, that are filled up.
_FILLED = 8
#: Sums of shares differ by less with the order of adding; a smaller excess is none that changes are made for.
_ROUNDING = 1e-12
_NONE = np.inf


@dataclass(frozen=True)
class Use:
    """A way to do an item.

    Attributes:
        sizes: What it takes of each of the two budgets.
        cost: What is to be small in total.
    """

    sizes: tuple[float, float]
    cost: float


def choose_within(
    items: Sequence[Sequence[Use]], budgets: tuple[float, float], starts: Iterable[Sequence[int]] = ()
) -> tuple[int, ...] | None:
    """Return the index of the choice for each item, or None if no assignment was found that fits.

    Whether one exists is a hard question; one that does is missed only if it fits by less than the steps of an item.

    Args:
        items: The choices of each, at least one.
        budgets: Largest sums of sizes; above 0.
        starts: Assignments (an index for each item) that the result must not be worse than, if they fit.
    """
    table = _Table(items, budgets)
    found = [np.array(start, int) for start in starts]
    for ratio in np.linspace(0, 1, _RATIOS):
        found += [table.repaired(picked) for picked in table.priced(ratio)]
    fitting = sorted((picked for picked in found if table.fits(picked)), key=table.cost)
    filled = [table.filled(picked) for picked in fitting[:_FILLED]]
    return tuple(int(i) for i in min(filled, key=table.cost)) if filled else None


class _Table:
    """Costs [items, choices] and shares of the budgets [2, items, choices]; infinite for choices that are not there."""

    def __init__(self, items: Sequence[Sequence[Use]], budgets: tuple[float, float]) -> None:
        shape = (len(items), max(map(len, items), default=0))
        self.costs = np.full(shape, _NONE)
        self.shares = np.full((2, *shape), _NONE)
        for number, item in enumerate(items):
            self.costs[number, : len(item)] = [use.cost for use in item]
            for budget in (0, 1):
                self.shares[budget, number, : len(item)] = [use.sizes[budget] / budgets[budget] for use in item]
        self.sizes = [[use.sizes for use in item] for item in items]
        self.budgets = budgets
        self.numbers = np.arange(len(items))

    def cost(self, picked: Array) -> float:
        return float(self.costs[self.numbers, picked].sum())

    def fits(self, picked: Array) -> bool:
        """Add up as the caller does, so that no rounding lets a sum be a little too large."""
        chosen = [sizes[i] for sizes, i in zip(self.sizes, picked, strict=True)]
        return all(sum(size[b] for size in chosen) <= self.budgets[b] for b in (0, 1))

    def priced(self, ratio: float) -> list[Array]:
        """Return the assignment with the lowest prices that fits, and that with the highest that does not.

        Args:
            ratio: Share of the second price.
        """
        weighted = (1 - ratio) * self.shares[0] + ratio * self.shares[1] if 0 < ratio < 1 else self.shares[int(ratio)]
        low, high = _PRICES
        found: dict[bool, Array] = {}
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            picked = np.argmin(self.costs + 2.0**middle * weighted, axis=1)
            fits = self.fits(picked)
            found[fits] = picked
            low, high = (low, middle) if fits else (middle, high)
        return list(found.values())

    def repaired(self, picked: Array) -> Array:
        """Change one item at a time until everything fits, or no change makes the excess smaller."""
        picked = picked.copy()
        while not self.fits(picked):
            used = self.shares[:, self.numbers, picked]
            over = used.sum(axis=1) - 1
            excess = np.maximum(over, 0).sum() - _ROUNDING
            then = np.maximum(over[:, None, None] + self.shares - used[:, :, None], 0).sum(axis=0)
            price = self.costs - self.costs[self.numbers, picked][:, None]
            with np.errstate(invalid="ignore"):  # choices that an item does not have
                rate = np.where(then < excess, price / (excess - then), _NONE)
            number, index = np.unravel_index(np.argmin(rate), rate.shape)
            if not np.isfinite(rate[number, index]):
                break
            picked[number] = index
        return picked

    def filled(self, picked: Array) -> Array:
        """Change one item at a time while that saves cost and fits; the change that saves most comes first."""
        picked = picked.copy()
        while True:
            now = self.costs[self.numbers, picked][:, None]
            used = self.shares[:, self.numbers, picked]
            free = 1 - used.sum(axis=1)
            fits = (self.shares - used[:, :, None] <= free[:, None, None]).all(axis=0)
            saved = np.where(fits, now - self.costs, 0)
            changed = False
            for place in np.argsort(-saved, axis=None):
                number, index = np.unravel_index(place, saved.shape)
                if saved[number, index] <= 0:
                    break
                tried = picked.copy()
                tried[number] = index
                if self.fits(tried):
                    picked, changed = tried, True
                    break
            if not changed:
                return picked
