from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim_llm.products.knapsack import Choice, choose

#: Costs are sums of floats: two orders of adding them differ by rounding.
ROUNDING = 1e-9

_ITEM = st.lists(st.builds(Choice, st.integers(1, 40), st.floats(0, 100)), min_size=3, max_size=3)
_ITEMS = st.lists(_ITEM, min_size=1, max_size=5)


def _sums(items: list[list[Choice]], picked: tuple[int, ...]) -> tuple[int, float]:
    chosen = [item[i] for item, i in zip(items, picked, strict=True)]
    return sum(c.size for c in chosen), sum(c.cost for c in chosen)


@given(items=_ITEMS, budget=st.integers(1, 200))
@settings(max_examples=200)
def test_it_is_never_worse_than_the_same_choice_for_all(items: list[list[Choice]], budget: int) -> None:
    uniform = [(index,) * len(items) for index in range(3)]
    picked = choose(items, budget, uniform)
    if picked is None:
        assert sum(min(c.size for c in item) for item in items) > budget
        return
    size, cost = _sums(items, picked)
    assert size <= budget
    for start in uniform:
        other, worst = _sums(items, start)
        assert other > budget or cost <= worst + ROUNDING


@given(items=_ITEMS)
@settings(max_examples=100)
def test_budgets_that_whole_steps_fill_are_filled_exactly_right(items: list[list[Choice]]) -> None:
    every = [_sums(items, picked) for picked in itertools.product(range(3), repeat=len(items))]
    largest = max(size for size, _ in every)
    for budget in range(min(size for size, _ in every), largest + 1, max(1, largest // 7)):
        picked = choose(items, budget)
        assert picked is not None
        size, cost = _sums(items, picked)
        # A bound for any assignment: the best one of the size that was really used cannot be cheaper by more than the
        # largest single step, because only the last step of the hull may be missing.
        best = min(c for s, c in every if s <= budget)
        slack = max(max(c.cost for c in item) - min(c.cost for c in item) for item in items)
        assert size <= budget
        assert best - ROUNDING <= cost <= best + slack + ROUNDING


def test_bits_go_where_a_byte_saves_most() -> None:
    dull = [Choice(10, 2.0), Choice(20, 1.0)]
    sore = [Choice(10, 90.0), Choice(20, 10.0)]
    assert choose([dull, sore, dull], 40) == (0, 1, 0)


def test_what_cannot_fit_is_refused() -> None:
    assert choose([[Choice(10, 0.0)], [Choice(5, 1.0)]], 14) is None
