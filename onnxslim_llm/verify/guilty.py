"""Find the pass after which a model is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.runtime.session import Session
from onnxslim_llm.verify.check import Verification, Verifier

__all__ = ["Guilty", "find_guilty", "first_failing"]

T = TypeVar("T")


@dataclass(frozen=True)
class Guilty:
    """The pass that broke the model.

    Attributes:
        index, name: of the pass.
        failure: what is wrong after it: a verification whose gates fail, or the error of opening or running it.
    """

    index: int
    name: str
    failure: Verification | ModelError


def first_failing(passes: int, fails: Callable[[int], bool]) -> int | None:
    """Index of a pass that breaks a model, by bisection in about log2(n) + 2 checks.

    Args:
        passes: how many there are.
        fails: whether the model is wrong after that many of them (0: before the first).

    Returns:
        A pass before which the model is right and after which it is wrong; if passes break and repair it in turn, one
        of the breaking ones. None if it is right after all of them, or wrong before the first.
    """
    if not fails(passes) or fails(0):
        return None
    good, bad = 0, passes
    while bad - good > 1:
        middle = (good + bad) // 2
        if fails(middle):
            bad = middle
        else:
            good = middle
    return bad - 1


def find_guilty(
    verifier: Verifier,
    snapshots: Sequence[T],
    names: Sequence[str],
    opener: Callable[[T], Session],
    kind: str,
) -> Guilty | None:
    """The pass whose output first misses the gates of `kind`.

    Args:
        verifier: holds the source and its inputs.
        snapshots: the model before the first pass and after each; whatever `opener` takes.
        names: of the passes, one fewer than snapshots.
        opener: opens a snapshot in its runtime; one that cannot be opened or run is bad too.
        kind: see `gates.KINDS`.

    Returns:
        None if the last snapshot passes or the first one does not.

    Raises:
        UsageError: the numbers of names and snapshots do not fit, or the kind is unknown.
    """
    if len(names) != len(snapshots) - 1:
        raise UsageError(f"{len(snapshots)} snapshots need {len(snapshots) - 1} pass names, not {len(names)}")
    seen: dict[int, Verification | ModelError] = {}

    def is_bad(index: int) -> bool:
        if index not in seen:
            try:
                seen[index] = verifier.check(opener(snapshots[index]), kind)
            except ModelError as error:
                seen[index] = error
        found = seen[index]
        return isinstance(found, ModelError) or not found.ok

    index = first_failing(len(names), is_bad)
    return None if index is None else Guilty(index, names[index], seen[index + 1])
