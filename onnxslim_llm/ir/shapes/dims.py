"""Dimensions as integer polynomials over symbols, so that `past + sequence` met twice is known to be the same.

A `Dim` is an int or an `Expr`; arithmetic gives back an int whenever the symbols cancel. Two expressions are equal
exactly if their canonical texts are; the text is what is written as `dim_param`, and `parse` reads it back (and the
texts that torch's exporters write, such as "s0 + 1" or "2*s1").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

__all__ = ["Dim", "Expr", "divide", "is_nonnegative", "is_positive", "parse", "product", "symbol"]

Monomial = tuple[str, ...]


class Expr:
    """A polynomial with integer coefficients over symbols that stand for sizes (integers >= 0).

    Not built directly: `symbol`, `parse` and arithmetic make it.
    """

    __slots__ = ("_hash", "terms")

    def __init__(self, terms: tuple[tuple[Monomial, int], ...]) -> None:
        self.terms = terms
        self._hash = hash(terms)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expr) and self.terms == other.terms

    def __hash__(self) -> int:
        return self._hash

    def __add__(self, other: Dim) -> Dim:
        total = dict(self.terms)
        for monomial, factor in _terms(other):
            total[monomial] = total.get(monomial, 0) + factor
        return _normal(total)

    def __neg__(self) -> Dim:
        return self * -1

    def __sub__(self, other: Dim) -> Dim:
        return self + other * -1

    def __rsub__(self, other: int) -> Dim:
        return self * -1 + other

    def __mul__(self, other: Dim) -> Dim:
        total: dict[Monomial, int] = {}
        for left, a in self.terms:
            for right, b in _terms(other):
                monomial = tuple(sorted(left + right))
                total[monomial] = total.get(monomial, 0) + a * b
        return _normal(total)

    __radd__ = __add__
    __rmul__ = __mul__

    def __str__(self) -> str:
        text = ""
        for monomial, factor in self.terms:
            sign, size = ("-" if factor < 0 else "+"), abs(factor)
            word = "*".join(monomial)
            if size != 1 or not monomial:
                word = f"{size}*{word}" if monomial else str(size)
            text += f" {sign} {word}" if text else (f"-{word}" if sign == "-" else word)
        return text

    __repr__ = __str__


Dim = int | Expr


def _terms(value: Dim) -> tuple[tuple[Monomial, int], ...]:
    return value.terms if isinstance(value, Expr) else (((), value),)


def _normal(terms: Mapping[Monomial, int]) -> Dim:
    # The constant goes last, as people and torch's exporters write it.
    kept = tuple(sorted(((m, c) for m, c in terms.items() if c), key=lambda t: (not t[0], t[0])))
    if not kept:
        return 0
    if len(kept) == 1 and not kept[0][0]:
        return kept[0][1]
    return Expr(kept)


def symbol(name: str) -> Expr:
    """Return the expression that is the single symbol `name`."""
    return Expr((((name,), 1),))


def product(dims: Iterable[Dim]) -> Dim:
    """Return the product of all `dims`; 1 for none."""
    total: Dim = 1
    for dim in dims:
        total = total * dim
    return total


def is_nonnegative(value: Dim) -> bool:
    """Return whether `value` is >= 0 whatever the sizes are; False if that is not known."""
    return all(factor >= 0 for _, factor in _terms(value))


def is_positive(value: Dim) -> bool:
    """Return whether `value` is > 0 whatever the sizes (0 included) are; False if that is not known."""
    return is_nonnegative(value) and any(not monomial for monomial, _ in _terms(value)) and value != 0


def divide(dividend: Dim, divisor: Dim) -> Dim | None:
    """Return the floor of the quotient, or None where it is not known.

    An inexact quotient of two nonnegative expressions becomes a symbol of its own, named after the division.
    """
    if isinstance(dividend, int) and isinstance(divisor, int):
        return dividend // divisor if divisor else None
    if divisor == 0:
        return None
    if dividend == 0:
        return 0
    parts = _terms(divisor)
    if len(parts) == 1:
        exact = _divide_by_monomial(dividend, *parts[0])
        if exact is not None:
            return exact
    if dividend == divisor:
        return 1
    if not is_nonnegative(dividend) or not is_nonnegative(divisor):
        return None
    return symbol(f"floor({dividend} / {divisor})")


def _divide_by_monomial(dividend: Dim, monomial: Monomial, factor: int) -> Dim | None:
    total: dict[Monomial, int] = {}
    for names, size in _terms(dividend):
        rest = list(names)
        for name in monomial:
            if name not in rest:
                return None
            rest.remove(name)
        if size % factor:
            return None
        total[tuple(rest)] = size // factor
    return _normal(total)


_TOKEN = re.compile(r"\s*(?:(\d+)|([A-Za-z_][\w.:]*)|(\*\*|//|[-+*()]))")


@lru_cache(maxsize=4096)
def parse(text: str) -> Dim:
    """Return the expression that a `dim_param` spells; a text that is no sum of products is one opaque symbol."""
    tokens: list[str] = []
    position = 0
    end = len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None or match[3] in ("**", "//"):
            return symbol(text)
        tokens.append(match[0].strip())
        position = match.end()
    try:
        value = _sum(tokens)
    except (IndexError, ValueError):
        return symbol(text)
    return symbol(text) if tokens else value


def _sum(tokens: list[str]) -> Dim:
    negative = tokens[0] == "-"
    if negative:
        tokens.pop(0)
    total = _product(tokens)
    total = -total if negative else total
    while tokens and tokens[0] in "+-":
        sign = tokens.pop(0)
        term = _product(tokens)
        total = total + (term if sign == "+" else -term)
    return total


def _product(tokens: list[str]) -> Dim:
    total = _factor(tokens)
    while tokens and tokens[0] == "*":
        tokens.pop(0)
        total = total * _factor(tokens)
    return total


def _factor(tokens: list[str]) -> Dim:
    token = tokens.pop(0)
    if token == "(":
        value = _sum(tokens)
        if tokens.pop(0) != ")":
            raise ValueError(token)
        return value
    if token.isdigit():
        return int(token)
    if token in "+-*)":
        raise ValueError(token)
    if tokens and tokens[0] == "(":
        raise ValueError(token)  # a function: opaque as a whole
    return symbol(token)
