"""Sizes as people write them."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxslim_llm.cli.params import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("800MB", 800_000_000),
        ("800mb", 800_000_000),
        (" 800 M ", 800_000_000),
        ("1.5GiB", 3 * 2**29),
        (".5k", 500),
        ("2g", 2_000_000_000),
        ("4KiB", 4096),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1", "1e9", "10 apples", "0", "0.1", "1,5GB", "1 2"])
def test_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no size|not positive"):
        parse_size(text)


@given(st.integers(1, 10**15))
def test_plain_numbers_are_bytes(number: int) -> None:
    assert parse_size(str(number)) == parse_size(f"{number}B") == number


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    with suppress(ValueError):
        assert parse_size(text) >= 1
