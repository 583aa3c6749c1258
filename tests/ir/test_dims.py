"""Expressions of sizes: arithmetic, canonical text, what is known about signs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxslim_llm.ir.shapes.dims import Dim, Expr, divide, is_nonnegative, is_positive, parse, product, symbol

a, b = symbol("a"), symbol("b")

NAMES = ("a", "b", "past_sequence_length")


@st.composite
def dims(draw: st.DrawFn, depth: int = 3) -> tuple[Dim, str]:
    """An expression, and Python text that computes it."""
    if depth == 0 or draw(st.booleans()):
        if draw(st.booleans()):
            number = draw(st.integers(-5, 9))
            return number, f"({number})"
        name = draw(st.sampled_from(NAMES))
        return symbol(name), name
    (left, x), (right, y) = draw(dims(depth - 1)), draw(dims(depth - 1))
    kind = draw(st.sampled_from("+-*"))
    value = left + right if kind == "+" else left - right if kind == "-" else left * right
    return value, f"({x} {kind} {y})"


def value_of(dim: Dim, sizes: dict[str, int]) -> int:
    return dim if isinstance(dim, int) else int(eval(str(dim), {}, sizes))


SIZES = st.fixed_dictionaries({name: st.integers(0, 50) for name in NAMES})


@given(dims(), SIZES)
def test_arithmetic_is_that_of_integers(pair: tuple[Dim, str], sizes: dict[str, int]) -> None:
    dim, text = pair
    assert value_of(dim, sizes) == eval(text, {}, sizes)


@given(dims())
def test_text_is_canonical_and_read_back(pair: tuple[Dim, str]) -> None:
    dim, _ = pair
    assert parse(str(dim)) == dim


@given(dims(), dims(), SIZES)
def test_what_is_said_about_signs_holds(one: tuple[Dim, str], other: tuple[Dim, str], sizes: dict[str, int]) -> None:
    difference = one[0] - other[0]
    if is_nonnegative(difference):
        assert value_of(one[0], sizes) >= value_of(other[0], sizes)
    if is_positive(difference):
        assert value_of(one[0], sizes) > value_of(other[0], sizes)


@given(dims(), st.integers(1, 6))
def test_a_product_divides_back(pair: tuple[Dim, str], factor: int) -> None:
    dim, _ = pair
    assert divide(dim * factor, factor) == dim
    assert divide(dim * factor * a, a * factor) == dim


def test_symbols_that_cancel_leave_a_number() -> None:
    assert (a + b) - b == a
    assert a * 2 - a - a == 0
    assert isinstance(a - a + 3, int)
    assert product([a, 2, b, 3]) == 6 * a * b
    assert hash(a + b) == hash(b + a)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("past_sequence_length + sequence_length", "past_sequence_length + sequence_length"),
        ("sequence_length+past_sequence_length", "past_sequence_length + sequence_length"),
        ("2*s0 + 1", "2*s0 + 1"),
        ("1 + s0*2", "2*s0 + 1"),
        ("(s0 + 1)*s1", "s0*s1 + s1"),
        ("-s0 + s1", "-s0 + s1"),
        ("7", "7"),
        ("batch.size:0", "batch.size:0"),
    ],
)
def test_texts_of_exporters(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical


@pytest.mark.parametrize(
    "text", ["s0//2", "s0**2", "Max(1, s0)", "floor(a / 2)", "a +", "a b", "(a", "a)", "*a", "größe", "-"]
)
def test_what_is_no_sum_of_products_is_one_opaque_name(text: str) -> None:
    dim = parse(text)
    assert isinstance(dim, Expr)
    assert str(dim) == text
    assert dim == parse(text)


def test_quotients() -> None:
    assert divide(7, 2) == 3
    assert divide(a * b * 4, a * 2) == 2 * b
    assert divide(a + 1, a + 1) == 1
    assert divide(a, 0) is None
    assert divide(a - 1, 2) is None  # may be negative: floor and truncation differ
    half = divide(a + 1, 2)
    assert half == divide(a + 1, 2)
    assert half != divide(a, 2)
