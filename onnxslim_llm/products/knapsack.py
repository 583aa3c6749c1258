"""One choice for every item, so that the costs are least within a budget: the multiple-choice knapsack.

On the lower convex hull of an item's (size, cost) points, every step to the next larger choice saves less per byte than
the one before. Taking the best steps of all items first is exact for every budget that it happens to fill; what is left
of another one is filled by single changes. The result is never worse than any of the starting points that fit.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Choice", "choose"]


@dataclass(frozen=True)
class Choice:
    """A way to do an item.

    Attributes:
        size: What it takes of the budget.
        cost: What is to be small in total.
    """

    size: int
    cost: float


def choose(
    items: Sequence[Sequence[Choice]], budget: int, starts: Iterable[Sequence[int]] = ()
) -> tuple[int, ...] | None:
    """Return the index of the choice for each item, or None if even the smallest ones do not fit.

    Args:
        items: The choices of each, at least one.
        budget: Largest sum of sizes.
        starts: Assignments (an index for each item) that the result must not be worse than, if they fit.
    """
    smallest = [min(range(len(item)), key=lambda i: (item[i].size, item[i].cost)) for item in items]
    if _size(items, smallest) > budget:
        return None
    candidates: list[list[int]] = [_greedy(items, budget), *(list(start) for start in starts)]
    fitting = [picked for picked in candidates if _size(items, picked) <= budget]
    filled = [_filled(items, picked, budget) for picked in fitting]
    costs = [_cost(items, picked) for picked in filled]
    return tuple(filled[costs.index(min(costs))])


def _size(items: Sequence[Sequence[Choice]], picked: Sequence[int]) -> int:
    return sum(item[i].size for item, i in zip(items, picked, strict=True))


def _cost(items: Sequence[Sequence[Choice]], picked: Sequence[int]) -> float:
    return sum(item[i].cost for item, i in zip(items, picked, strict=True))


def _hull(item: Sequence[Choice]) -> list[int]:
    """Return the choices on the lower convex hull, from the smallest to the one with the least cost."""
    hull: list[int] = []
    for index in sorted(range(len(item)), key=lambda i: (item[i].size, item[i].cost)):
        point = item[index]
        if hull and point.cost >= item[hull[-1]].cost:
            continue
        while len(hull) > 1 and _rate(item[hull[-2]], item[hull[-1]]) <= _rate(item[hull[-2]], point):
            hull.pop()
        hull.append(index)
    return hull


def _rate(smaller: Choice, larger: Choice) -> float:
    """Cost that a byte more saves."""
    return (smaller.cost - larger.cost) / (larger.size - smaller.size)


def _greedy(items: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    hulls = [_hull(item) for item in items]
    place = [0] * len(items)
    free = budget - _size(items, [hull[0] for hull in hulls])
    steps: list[tuple[float, int]] = []

    def offer(number: int) -> None:
        hull, at = hulls[number], place[number]
        if at + 1 < len(hull):
            heapq.heappush(steps, (-_rate(items[number][hull[at]], items[number][hull[at + 1]]), number))

    for number in range(len(items)):
        offer(number)
    while steps:
        _, number = heapq.heappop(steps)
        item, hull, at = items[number], hulls[number], place[number]
        more = item[hull[at + 1]].size - item[hull[at]].size
        if more <= free:
            free -= more
            place[number] += 1
            offer(number)
    return [hull[at] for hull, at in zip(hulls, place, strict=True)]


def _filled(items: Sequence[Sequence[Choice]], picked: list[int], budget: int) -> list[int]:
    """Change one item at a time while that saves cost and fits; the change that saves most comes first."""
    free = budget - _size(items, picked)
    while True:
        best = (0.0, 0, 0)
        for number, item in enumerate(items):
            now = item[picked[number]]
            for index, choice in enumerate(item):
                saved = now.cost - choice.cost
                if choice.size - now.size <= free and saved > best[0]:
                    best = (saved, number, index)
        if best[0] <= 0:
            return picked
        _, number, index = best
        free -= items[number][index].size - items[number][picked[number]].size
        picked[number] = index
