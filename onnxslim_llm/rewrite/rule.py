"""A rule: what to look for (`pattern`), when to keep off (`check`), what to put there instead (`rewrite`)."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import onnx_graphsurgeon as gs

from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.matcher import Match
from onnxslim_llm.rewrite.pattern import Output, PatternBuilder, Wildcard

__all__ = ["Refusal", "Rule", "algebra"]


@dataclass(frozen=True)
class Refusal:
    """Why a rule keeps off a place where its pattern fits.

    Attributes:
        reason: One sentence.
        culprit: Name of the node or tensor that is the reason.
    """

    reason: str
    culprit: str


class Rule(ABC):
    """One rewrite of a subgraph.

    Class attributes:
        keep_shared: Accept inner tensors that are used elsewhere too; their nodes then stay in the graph.
        explain: Report places where the pattern nearly fits. Off for small algebra, where every node is near something.
        near: Number of matched nodes from which a failed search counts as "nearly fits".
    """

    keep_shared: bool = False
    explain: bool = False
    near: int = 2

    @property
    def name(self) -> str:
        """Name in reports."""
        return type(self).__name__

    @abstractmethod
    def pattern(self, op: PatternBuilder, *wildcards: Any, **_: Any) -> Any:
        """Build the pattern: one output, or a tuple with further outputs that lie inside the first one's subgraph.

        The names of the parameters after `op` are the names of the wildcards.
        """

    def check(self, match: Match) -> Refusal | None:
        """Return why the rewrite would be wrong here, or None."""
        return None

    @abstractmethod
    def rewrite(self, op: Builder, match: Match) -> gs.Tensor | tuple[gs.Tensor, ...]:
        """Return what replaces the pattern's outputs: new tensors made with `op`, or tensors of the match."""

    @cached_property
    def outputs(self) -> tuple[Output, ...]:
        """The pattern, built once."""
        parameters = list(inspect.signature(self.pattern).parameters)[1:]
        built = self.pattern(PatternBuilder(), *(Wildcard(p) for p in parameters))
        outputs = built if isinstance(built, tuple) else (built,)
        if not all(isinstance(o, Output) for o in outputs):
            raise TypeError(f"{self.name}: a pattern returns outputs of nodes")
        return outputs

    @property
    def root_ops(self) -> tuple[str, ...]:
        """Operators that the root can have; the engine tries the rule only there."""
        return self.outputs[0].node.ops


class _Algebra(Rule):
    def __init__(
        self,
        name: str,
        pattern: Callable[..., Any],
        rewrite: Callable[..., Any],
        check: Callable[[Match], Refusal | None] | None,
        keep_shared: bool,
    ) -> None:
        self._name, self._rewrite, self._check = name, rewrite, check
        self.pattern = pattern  # type: ignore[method-assign]
        self.keep_shared = keep_shared

    @property
    def name(self) -> str:
        return self._name

    def pattern(self, op: PatternBuilder, *wildcards: Wildcard) -> Any:  # replaced in __init__
        raise NotImplementedError

    def check(self, match: Match) -> Refusal | None:
        return self._check(match) if self._check else None

    def rewrite(self, op: Builder, match: Match) -> Any:
        names = list(inspect.signature(self._rewrite).parameters)[1:]
        return self._rewrite(op, *(match if n == "match" else match[n] for n in names))


def algebra(
    name: str,
    pattern: Callable[..., Any],
    rewrite: Callable[..., Any],
    check: Callable[[Match], Refusal | None] | None = None,
    *,
    keep_shared: bool = True,
) -> Rule:
    """Return a rule written in one line.

    Args:
        name: The equation, for example "x * 1 -> x".
        pattern: `lambda op, x: op.Mul(x, 1.0)`.
        rewrite: `lambda op, x: x`; its parameters are wildcards of the pattern, or `match` for the match itself.
        check: Side condition.
        keep_shared: See `Rule`.
    """
    return _Algebra(name, pattern, rewrite, check, keep_shared)
