from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from onnxslim_llm.passes.lowrank.tensor_decomposition import cp, cp_tensor, hosvd, mode_spectrum, tucker_tensor

#: Float64 throughout; eigenvectors are exact to the square root of its precision where values nearly coincide.
TOLERANCE = 1e-7


def _tensor(*shape: int) -> np.ndarray:
    """Directions of falling importance, as in weights."""
    rng = np.random.default_rng(0)
    factors = [rng.standard_normal((size, 12)) for size in shape]
    factors[0] *= 0.7 ** np.arange(12)
    return cp_tensor(factors) + 0.05 * rng.standard_normal(shape)


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_tucker_of_a_matrix_is_the_singular_value_decomposition(rank: int) -> None:
    matrix = _tensor(20, 11)
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    found = tucker_tensor(*hosvd(matrix, (rank, rank)))
    assert np.allclose(found, u[:, :rank] * s[:rank] @ v[:rank], atol=TOLERANCE * s[0])


@pytest.mark.parametrize("rank", [1, 4])
def test_cp_of_a_matrix_is_the_singular_value_decomposition(rank: int) -> None:
    matrix = _tensor(20, 11)
    _, s, _ = np.linalg.svd(matrix)
    error = np.square(matrix - cp_tensor(cp(matrix, rank))).sum()
    assert error == pytest.approx((s[rank:] ** 2).sum(), rel=1e-3)


def test_full_ranks_are_exact() -> None:
    tensor = _tensor(4, 6, 5)
    core, factors = hosvd(tensor, tensor.shape)
    assert core.shape == tensor.shape
    assert np.allclose(tucker_tensor(core, factors), tensor, atol=TOLERANCE)


def test_the_error_of_tucker_falls_with_the_ranks_and_stays_below_its_bound() -> None:
    tensor = _tensor(6, 16, 14)
    lost = [mode_spectrum(tensor, mode) for mode in (1, 2)]
    before = np.inf
    for rank in (1, 2, 4, 8, 12):
        error = np.square(tensor - tucker_tensor(*hosvd(tensor, (6, rank, rank)))).sum()
        assert error < before
        assert error <= (lost[0][rank:].sum() + lost[1][rank:].sum()) * (1 + TOLERANCE)
        before = error


def test_the_error_of_cp_falls_with_the_rank() -> None:
    tensor = _tensor(6, 16, 14)
    errors = [np.square(tensor - cp_tensor(cp(tensor, rank))).sum() for rank in (1, 2, 4, 8, 12, 16)]
    assert all(after < before for before, after in pairwise(errors))
    assert errors[4] < 0.01 * np.square(tensor).sum()


def test_cp_gives_the_same_twice() -> None:
    tensor = _tensor(3, 8, 7)
    for first, second in zip(cp(tensor, 10), cp(tensor, 10), strict=True):
        assert np.array_equal(first, second)
