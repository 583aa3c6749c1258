"""Regular expressions by which users choose weights: matched against a weight's name and those of its readers."""

from __future__ import annotations

import re
from collections.abc import Iterable

from onnxslim_llm.errors import UsageError
from onnxslim_llm.products.sites import WeightGroup

__all__ = ["compile_patterns", "matching", "names_of"]


def compile_patterns(patterns: Iterable[str], where: str) -> list[re.Pattern[str]]:
    """Return compiled regular expressions.

    Raises:
        UsageError: One of them is none.
    """
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except (re.error, TypeError) as error:
            raise UsageError(f"{pattern!r} is no regular expression: {error}", where=where) from error
    return compiled


def names_of(group: WeightGroup) -> list[str]:
    """Return the names that a user may know a weight by."""
    return [group.name, *(site.node.name for site in group.sites)]


def matching(patterns: Iterable[re.Pattern[str]], group: WeightGroup) -> str:
    """Return the first pattern that is found in a name of the weight, or nothing."""
    names = names_of(group)
    return next((p.pattern for p in patterns if any(p.search(name) for name in names)), "")
