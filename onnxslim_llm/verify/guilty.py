"""Find the pass after which a model is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.runtime.session import Session
from onnxslim_llm.verify.check import Verification, Verifier

__all__ = ["Guilty", "find_guilty", "first_bad"]

T = TypeVar("T")


@dataclass(frozen=True)
class Guilty:
    """The pass that broke the model.

    Attributes:
        index: of the first bad snapshot, 0 being the model before the first pass.
        name: of the pass that made it.
        failure: what is wrong with it: a verification whose gates fail, or the error of opening or running it.
    """

    index: int
    name: str
    failure: Verification | ModelError


def first_bad(snapshots: Sequence[T], is_bad: Callable[[T], bool]) -> int | None:
    """Index of a bad snapshot whose predecessor is good, by bisection; None if the last one is good.

    If passes break and repair the model in turn, it is one of the breaking ones. Takes about log2(n) + 2 calls.
    """
    if not snapshots or not is_bad(snapshots[-1]):
        return None
    if len(snapshots) == 1 or is_bad(snapshots[0]):
        return 0
    good, bad = 0, len(snapshots) - 1
    while bad - good > 1:
        middle = (good + bad) // 2
        if is_bad(snapshots[middle]):
            bad = middle
        else:
            good = middle
    return bad


def find_guilty(
    verifier: Verifier,
    snapshots: Sequence[T],
    names: Sequence[str],
    opener: Callable[[T], Session],
    kind: str,
) -> Guilty | None:
    """The first pass whose output misses the gates of `kind`.

    Args:
        verifier: holds the source and its inputs.
        snapshots: the model before the first pass and after each; whatever `opener` takes.
        names: of the passes, one fewer than snapshots.
        opener: opens a snapshot in its runtime; one that cannot be opened or run is bad too.
        kind: see `gates.KINDS`.

    Returns:
        None if the last snapshot passes.

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

    index = first_bad(range(len(snapshots)), is_bad)
    if index is None:
        return None
    return Guilty(index, names[index - 1] if index else "(the model before the first pass)", seen[index])
