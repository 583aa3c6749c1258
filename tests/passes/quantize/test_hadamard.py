"""Hadamard matrices and rotations made of them."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest

from onnxslim_llm.passes.quantize.rotation.hadamard import factors, hadamard
from onnxslim_llm.passes.quantize.rotation.rotation import Rotated, Rotation
from onnxslim_llm.stats.moments import Moments

#: Sums of at most 1,000 float64 products of numbers around one.
EXACT = 1e-12
#: H of 200 rows of up to 36 channels around one has elements below 200 * 36, summed up from float32 products.
GRAM_TOLERANCE = 200 * 36 * 2**-22


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 24, 28, 36, 44, 52, 60, 64, 104])
def test_rows_are_orthogonal_and_entries_are_signs(order: int) -> None:
    found = factors(order)
    if order == 52:  # 51 and 25 are no primes: Paley's constructions do not reach it
        assert found is None
        return
    assert found is not None
    matrix = reduce(np.kron, [m.astype(np.int64) for m in found], np.ones((1, 1), np.int64))
    assert matrix.shape == (order, order)
    assert set(np.unique(matrix)) <= {-1, 1}
    assert np.array_equal(matrix @ matrix.T, order * np.eye(order, dtype=np.int64))


@pytest.mark.parametrize("order", [3, 5, 6, 7, 9, 10, 15, 18, 22, 26])
def test_orders_that_no_hadamard_matrix_has(order: int) -> None:
    assert hadamard(order) is None
    assert factors(order) is None


@pytest.mark.parametrize("size", [576, 768, 896, 1024, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 6656, 8192, 11008])
def test_sizes_of_real_models_are_known(size: int) -> None:
    found = factors(size)
    assert found is not None
    assert int(np.prod([len(m) for m in found])) == size


@pytest.mark.parametrize("size", [1, 9, 12, 18, 64, 96, 128, 352])
def test_a_rotation_is_orthogonal_and_fast_is_the_same_as_dense(size: int) -> None:
    rotation = Rotation(size, seed=5)
    dense = rotation.matrix
    assert np.abs(dense.T @ dense - np.eye(size)).max() < EXACT
    rows = np.random.default_rng(0).standard_normal((7, 3 * size))
    expected = (rows.reshape(7, 3, size) @ dense).reshape(7, -1)
    assert np.abs(rotation.apply(rows) - expected).max() < EXACT
    if rotation.is_hadamard:
        assert np.allclose(np.abs(dense), 1 / np.sqrt(size))


def test_float32_stays_float32() -> None:
    assert Rotation(12, 0).apply(np.ones((2, 12), np.float32)).dtype == np.float32


def test_vectors_that_are_no_multiple_are_refused() -> None:
    with pytest.raises(ValueError, match="pieces of 12"):
        Rotation(12, 0).apply(np.ones(18))


def test_seeds_differ() -> None:
    assert not np.array_equal(Rotation(16, 0).matrix, Rotation(16, 1).matrix)
    assert Rotation(16, 0).digest != Rotation(16, 1).digest


@pytest.mark.parametrize(("size", "channels"), [(12, 12), (12, 36), (9, 18)])
def test_moments_are_those_of_the_rotated_rows(size: int, channels: int) -> None:
    rows = np.random.default_rng(1).standard_normal((200, channels)).astype(np.float32) + 0.5
    rotation = Rotation(size, 2)
    before, expected = Moments(channels), Moments(channels)
    before.add(rows)
    expected.add(rotation.apply(rows))
    after = Rotated(rotation, channels).apply(before)
    for name in ("gram", "total", "square"):
        assert np.abs(getattr(after, name) - getattr(expected, name)).max() < GRAM_TOLERANCE, name
    assert after.count == expected.count
    assert (after.largest >= expected.largest * (1 - 1e-6)).all()  # a bound
