from __future__ import annotations

import numpy as np
import pytest

from onnxslim_llm.stats.curvature import DAMPING, output_error
from onnxslim_llm.stats.whitened import Alike, low_rank, spectrum, whitened_by

#: Decompositions in float64, factors kept in float32.
TOLERANCE = 1e-5


def _case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, 3)) @ rng.standard_normal((3, 20)) * 3 + rng.standard_normal((200, 20))
    return rng.standard_normal((20, 12)), x.T @ x


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_without_inputs_it_is_the_singular_value_decomposition(rank: int) -> None:
    matrix, _ = _case(0)
    u, s, v = np.linalg.svd(matrix)
    found = low_rank(matrix, Alike(), rank)
    assert np.allclose(found.left @ found.right, u[:, :rank] * s[:rank] @ v[:rank], atol=TOLERANCE * 10)
    assert np.allclose(found.energy[:12], s**2, rtol=TOLERANCE)


@pytest.mark.parametrize("rank", [1, 4])
def test_no_other_matrix_of_the_rank_has_a_smaller_output_error(rank: int) -> None:
    matrix, gram = _case(1)
    damped = gram + DAMPING * np.diag(gram).mean() * np.eye(20)
    whitening = whitened_by(gram)
    assert whitening is not None
    found = low_rank(matrix, whitening, rank)
    assert np.allclose(found.energy, spectrum(matrix, whitening), rtol=TOLERANCE)
    error = output_error((matrix - found.left @ found.right).astype(np.float32), damped).sum()
    assert error == pytest.approx(found.energy[rank:].sum(), rel=1e-4)
    rng = np.random.default_rng(2)
    for _ in range(20):
        left = found.left + 0.05 * rng.standard_normal(found.left.shape)
        right = np.linalg.solve(left.T @ damped @ left, left.T @ damped @ matrix)  # the best for this left factor
        other = output_error((matrix - left @ right).astype(np.float32), damped).sum()
        assert other >= error * (1 - 1e-4)


def test_an_input_that_says_nothing_gives_nothing() -> None:
    assert whitened_by(np.zeros((4, 4))) is None
