"""How an adapter says that its consumer has no such operator."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

__all__ = ["RefusalError", "find_unsupported"]


class RefusalError(Exception):
    """The consumer does not take the model.

    Args:
        what: One line.
        operators: What it has no form of.
    """

    def __init__(self, what: str, operators: Iterable[str] = ()) -> None:
        super().__init__(what)
        self.operators = list(dict.fromkeys(operators))


def find_unsupported(log: str, patterns: Sequence[str]) -> list[str]:
    """Return the first group of every match in a converter's log, each once, in order."""
    return list(dict.fromkeys(found for pattern in patterns for found in re.findall(pattern, log) if found))
