"""Patterns: ordinary Python that builds the subgraph which a rule looks for.

    def pattern(self, op, x, weight):
        mean = op.ReduceMean(op.Pow(x, 2.0), axes=[-1])
        return op.Mul(weight, op.Div(x, op.Sqrt(op.Add(mean, op.const("epsilon")))))

The arguments after `op` are wildcards and become bindings of the match. A number or list stands for a constant with
that value. Keyword arguments name attributes or, where an operator takes the same thing as an input at another opset
(the axes of a reduction), formal inputs: the matcher accepts both spellings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bind", "ConstantPattern", "Either", "NodePattern", "Output", "Pattern", "PatternBuilder", "Wildcard"]


class Pattern:
    """What a tensor must look like."""


@dataclass(frozen=True, eq=False)
class Wildcard(Pattern):
    """Any tensor; the same wildcard met again must be the same tensor."""

    name: str
    constant: bool = False


@dataclass(frozen=True, eq=False)
class ConstantPattern(Pattern):
    """A constant equal to `value` in every element (a scalar) or as a whole (a list)."""

    value: NDArray[Any]
    relative_tolerance: float = 1e-6


@dataclass(frozen=True, eq=False)
class NodePattern:
    """A node of one of the operators `ops` with these inputs and attributes; None is an omitted optional input."""

    ops: tuple[str, ...]
    domain: str
    inputs: tuple[Pattern | None, ...]
    attributes: Mapping[str, Any]
    name: str = ""
    open_ended: bool = False  # further inputs of the node are allowed and ignored


@dataclass(frozen=True, eq=False)
class Output(Pattern):
    """The output `index` of a node."""

    node: NodePattern
    index: int = 0


@dataclass(frozen=True, eq=False)
class Either(Pattern):
    """One of several patterns, tried in order."""

    alternatives: tuple[Pattern, ...]


@dataclass(frozen=True)
class Bind:
    """Accept an attribute if `accepts` does, and keep its value under `name`."""

    name: str
    accepts: Callable[[Any], bool] = field(default=lambda value: True)


def _as_pattern(value: Any) -> Pattern | None:
    if value is None or isinstance(value, Pattern):
        return value
    if isinstance(value, bool | int | float | Sequence | np.ndarray):
        return ConstantPattern(np.asarray(value))
    raise TypeError(f"a pattern input is a pattern, a number, a list or None, not {value!r}")


class PatternBuilder:
    """Builds patterns: `op.Add(x, 1.0)`, `op.any_of("Add", "Sub")(x, y)`, `op.const("epsilon")`."""

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op.startswith("_"):
            raise AttributeError(op)
        return self.any_of(op)

    def any_of(self, *ops: str) -> Callable[..., Any]:
        """Return a constructor for a node of any of the operators `ops`.

        Its keyword arguments starting with an underscore are `_domain`, `_name` (to find the node in the match),
        `_outputs` (more than one gives a tuple) and `_open_ended`; the others are attributes.
        """

        def build(
            *inputs: Any, _domain: str = "", _name: str = "", _outputs: int = 1, _open_ended: bool = False, **attrs: Any
        ) -> Output | tuple[Output, ...]:
            node = NodePattern(ops, _domain, tuple(map(_as_pattern, inputs)), attrs, _name, _open_ended)
            outputs = tuple(Output(node, i) for i in range(_outputs))
            return outputs[0] if _outputs == 1 else outputs

        return build

    @staticmethod
    def const(name: str) -> Wildcard:
        """Match any constant and bind it to `name`."""
        return Wildcard(name, constant=True)

    @staticmethod
    def var(name: str) -> Wildcard:
        """Match any tensor and bind it to `name`."""
        return Wildcard(name)

    @staticmethod
    def bind(name: str, accepts: Callable[[Any], bool] = lambda value: True) -> Bind:
        """Keep the value of an attribute under `name`."""
        return Bind(name, accepts)

    @staticmethod
    def either(*alternatives: Any) -> Either:
        """Match the first alternative that fits."""
        patterns = tuple(p for p in map(_as_pattern, alternatives) if p is not None)
        return Either(patterns)

    def maybe(self, op: str, x: Any, *rest: Any, **attrs: Any) -> Either:
        """Match `op(x, ...)` or `x` itself: an optional node."""
        return self.either(self.any_of(op)(x, *rest, **attrs), x)
