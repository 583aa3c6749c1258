"""Padding on either side and the way a text is cut into cached steps do not change the logits of real tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

Array = NDArray[Any]
Step = Callable[..., tuple[Array, dict[str, Array]]]

# Same products, summed in other orders and other kernel shapes: see tests/models/test_against_numpy.py, both sides
# float32 here, so sqrt(2) times its deviation of 5e-5, and four of those.
MAX_DELTA = 3e-4
TOKENS = 24


@pytest.fixture(scope="module")
def ids(config: dict[str, Any]) -> Array:
    return np.random.default_rng(3).integers(2, config["vocab_size"], (1, TOKENS))


@pytest.fixture(scope="module")
def plain(step: Step, ids: Array) -> Array:
    return step(ids, np.ones_like(ids), np.arange(TOKENS)[None])[0]


@pytest.mark.parametrize("cuts", [[TOKENS - 1, 1], [1, TOKENS - 1], [7, 1, 9, 7], [1] * TOKENS])
def test_cached_steps(step: Step, ids: Array, plain: Array, cuts: list[int]) -> None:
    cache: dict[str, Array] = {}
    done, parts = 0, []
    for count in cuts:
        total = done + count
        logits, cache = step(ids[:, done:total], np.ones((1, total), np.int64), np.arange(done, total)[None], cache)
        parts.append(logits)
        done = total
    assert all(tensor.shape[2] == TOKENS for tensor in cache.values())
    np.testing.assert_allclose(np.concatenate(parts, axis=1), plain, rtol=0, atol=MAX_DELTA)


@pytest.mark.parametrize(("left", "right"), [(5, 0), (0, 5), (3, 4)])
def test_padding(step: Step, ids: Array, plain: Array, left: int, right: int) -> None:
    """A padded row beside a full one: the padding holds token ids that would matter if they were seen."""
    rng = np.random.default_rng(4)
    rows = rng.integers(2, 2048, (2, left + TOKENS + right))
    rows[1, left : left + TOKENS] = ids[0]
    mask = np.ones_like(rows)
    mask[1, :left] = 0
    mask[1, left + TOKENS :] = 0
    positions = np.clip(mask.cumsum(1) - 1, 0, None)
    logits, _ = step(rows, mask, positions)
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[1, left : left + TOKENS], plain[0], rtol=0, atol=MAX_DELTA)


def test_left_padding_followed_by_cached_steps(step: Step, ids: Array, plain: Array) -> None:
    left, first = 6, 10
    row = np.concatenate((np.full((1, left), 9), ids), axis=1)
    mask = np.ones_like(row)
    mask[:, :left] = 0
    positions = np.clip(mask.cumsum(1) - 1, 0, None)
    _, cache = step(row[:, : left + first], mask[:, : left + first], positions[:, : left + first])
    logits, _ = step(row[:, left + first :], mask, positions[:, left + first :], cache)
    np.testing.assert_allclose(logits, plain[:, first:], rtol=0, atol=MAX_DELTA)


def test_later_tokens_are_not_seen(step: Step, ids: Array, plain: Array) -> None:
    changed = ids.copy()
    changed[0, -1] = 2 if ids[0, -1] != 2 else 3
    logits, _ = step(changed, np.ones_like(ids), np.arange(TOKENS)[None])
    np.testing.assert_array_equal(logits[:, :-1], plain[:, :-1])
    assert np.abs(logits[:, -1] - plain[:, -1]).max() > 100 * MAX_DELTA
