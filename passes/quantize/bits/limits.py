"""The forms that cost least within what all weights together may take: bytes, time, or both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from onnxslim_llm.errors import UsageError
from onnxslim_llm.products.knapsack import Choice, choose
from onnxslim_llm.products.two_budgets import Use, choose_within

__all__ = ["Form", "Limits", "choose_forms"]

#: Times are counted in so many parts of a second.
_TICKS = 10**12


@dataclass(frozen=True)
class Limits:
    """What all weights together may take.

    Attributes:
        bits: Per weight; 0 is no limit.
        milliseconds: For one token; 0 is no limit.
    """

    bits: float = 0.0
    milliseconds: float = 0.0


@dataclass(frozen=True)
class Form:
    """A form that a weight may get.

    Attributes:
        nbytes: What it takes in the file.
        seconds: What it takes of a token's time.
        cost: What is to be small in total.
    """

    nbytes: int
    seconds: float
    cost: float


def choose_forms(
    items: Sequence[Sequence[Form]], elements: int, limits: Limits, starts: Iterable[Sequence[int]], where: str
) -> tuple[int, ...]:
    """Return the index of each weight's form.

    Args:
        items: The forms of each weight, at least one.
        elements: Of all weights.
        limits: At least one.
        starts: Assignments that the result must not be worse than, if they fit.
        where: For messages.

    Raises:
        UsageError: Nothing was found that fits.
    """
    nbytes, ticks = int(limits.bits * elements / 8), int(limits.milliseconds / 1e3 * _TICKS)
    if limits.bits:
        sized = [[Choice(f.nbytes, f.cost) for f in item] for item in items]
        picked = choose(sized, nbytes, starts := list(starts))
        if picked is None:
            least = 8 * sum(min(f.nbytes for f in item) for item in items) / max(elements, 1)
            todo = f"ask for {least:.2f} or more, or allow fewer bits"
            raise UsageError(f"the weights do not fit into {limits.bits} bits each", where=where, todo=todo)
        if not limits.milliseconds or sum(map(_ticks, _picked(items, picked))) <= ticks:
            return picked
        both = [[Use((f.nbytes, _ticks(f)), f.cost) for f in item] for item in items]
        found = choose_within(both, (nbytes, ticks), starts)
    else:
        found = choose([[Choice(_ticks(f), f.cost) for f in item] for item in items], ticks, starts)
    if found is None:
        raise _too_slow(items, nbytes, limits, where)
    return found


def _picked(items: Sequence[Sequence[Form]], picked: Sequence[int]) -> Iterable[Form]:
    return (item[i] for item, i in zip(items, picked, strict=True))


def _ticks(form: Form) -> int:
    return round(form.seconds * _TICKS)


def _too_slow(items: Sequence[Sequence[Form]], nbytes: int, limits: Limits, where: str) -> UsageError:
    """Return the error that says the shortest time."""
    sizes = [[Choice(f.nbytes if limits.bits else 0, f.seconds) for f in item] for item in items]
    fastest = choose(sizes, nbytes)
    assert fastest is not None, "the bytes have been checked"
    least = 1e3 * sum(form.seconds for form in _picked(items, fastest))
    within = f" within {limits.bits:g} bits a weight" if limits.bits else ""
    what = f"a token's products do not fit into {limits.milliseconds:g} ms{within}: the fastest forms take {least:.3g}"
    more = " or more bits" if limits.bits else ""
    return UsageError(what, where=where, todo=f"ask for {_rounded_up(least)} ms or more{more}, or allow other widths")


def _rounded_up(milliseconds: float) -> str:
    """Return a time with three digits that is not below the given one."""
    return f"{milliseconds * 1.005:.3g}"
