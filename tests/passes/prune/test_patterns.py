"""Patterns of zeros: exact counts, the right weights, and what cannot be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxslim_llm.errors import UsageError
from onnxslim_llm.passes.prune.zeros.patterns import Pattern

SCORES = np.random.default_rng(0).random((48, 32))


def pattern(text: str) -> Pattern:
    return Pattern.parse(text, "here")


@given(st.floats(0, 0.999), st.integers(1, 40), st.integers(1, 40))
def test_unstructured_zeros_are_the_smallest_and_exactly_as_many(sparsity: float, rows: int, columns: int) -> None:
    scores = np.random.default_rng(rows * columns).random((rows, columns))
    kept = pattern("unstructured").kept(scores, sparsity)
    assert kept.size - kept.sum() == round(kept.size * sparsity)
    if 0 < kept.sum() < kept.size:
        assert scores[kept].min() >= scores[~kept].max()


@pytest.mark.parametrize(("text", "n", "m"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:2", 1, 2), ("3:4", 3, 4)])
def test_n_of_m_keeps_the_largest_of_every_group(text: str, n: int, m: int) -> None:
    kept = pattern(text).kept(SCORES, 0.1)
    groups, scores = kept.reshape(-1, m, 32), SCORES.reshape(-1, m, 32)
    assert (groups.sum(axis=1) == n).all()
    lowest = np.where(groups, scores, np.inf).min(axis=1)
    assert (lowest >= np.where(groups, -np.inf, scores).max(axis=1)).all()
    assert pattern(text).sparsity == 1 - n / m


def test_blocks_are_zero_as_a_whole() -> None:
    kept = pattern("16x8").kept(SCORES, 0.5)
    blocks = kept.reshape(3, 16, 4, 8).transpose(0, 2, 1, 3).reshape(12, -1)
    assert (blocks.all(axis=1) | ~blocks.any(axis=1)).all()
    assert blocks.any(axis=1).sum() == 6


@pytest.mark.parametrize("text", ["dense", "4:2", "0:4", "4:4", "16", "16x0", ""])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        pattern(text)
    assert caught.value.where == "here"


def test_a_pattern_says_which_matrices_cannot_have_it() -> None:
    assert pattern("2:4").refusal(30, 8) == "K = 30 is no multiple of 4, which '2:4' needs"
    assert pattern("16x16").refusal(32, 24) == "[32, 24] cannot be cut into blocks of 16x16"
    assert not pattern("2:4").refusal(32, 7)
    assert not pattern("unstructured").refusal(31, 7)
