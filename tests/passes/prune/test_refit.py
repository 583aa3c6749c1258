"""Making up for zeros: against least squares solved column by column, and in the right order of errors."""

from __future__ import annotations

import numpy as np
import pytest

from onnxslim_llm.passes.prune.zeros.one_shot import prune_in_order
from onnxslim_llm.passes.prune.zeros.patterns import Pattern
from onnxslim_llm.passes.prune.zeros.refit import refit
from onnxslim_llm.passes.prune.zeros.scores import scores_of
from onnxslim_llm.stats.curvature import DAMPING, inverse_factor, output_error

K, N = 64, 24
#: Conjugate gradients in float32: 1e-7 times the condition of the damped H, some thousands.
TOLERANCE = 2e-3


@pytest.fixture
def rows() -> np.ndarray:
    """Correlated inputs."""
    rng = np.random.default_rng(1)
    return (rng.normal(size=(500, 8)) @ rng.normal(size=(8, K)) + 0.3 * rng.normal(size=(500, K))).astype(np.float32)


@pytest.fixture
def weight() -> np.ndarray:
    return np.random.default_rng(2).normal(size=(K, N)).astype(np.float32)


def test_refit_solves_the_least_squares_of_every_column(rows: np.ndarray, weight: np.ndarray) -> None:
    gram = rows.T @ rows
    kept = Pattern.parse("unstructured", "").kept(np.abs(weight), 0.5)
    found = refit(weight, np.where(kept, weight, 0), kept, gram)
    assert not found[~kept].any()
    damped = gram.astype(np.float64) + DAMPING * np.diagonal(gram).mean() * np.eye(K)
    for n in range(N):
        s = kept[:, n]
        wanted = np.linalg.solve(damped[np.ix_(s, s)], damped[s] @ weight[:, n])
        assert np.abs(found[s, n] - wanted).max() <= TOLERANCE * np.abs(wanted).max()


@pytest.mark.parametrize("text", ["unstructured", "2:4", "4:8", "8x8"])
def test_every_step_of_knowledge_lowers_the_error(rows: np.ndarray, weight: np.ndarray, text: str) -> None:
    gram = rows.T @ rows
    pattern = Pattern.parse(text, "")
    mean_square = np.diagonal(gram) / len(rows)
    by_magnitude = pattern.kept(scores_of("magnitude", weight, None), 0.5)
    by_input = pattern.kept(scores_of("wanda", weight, mean_square), 0.5)
    factor = inverse_factor(gram)
    assert factor is not None
    in_order, kept = prune_in_order(weight, factor, pattern, 0.5)
    fitted = refit(weight, in_order, kept, gram)

    def error(pruned: np.ndarray) -> float:
        return float(output_error(weight - pruned, gram).sum())

    errors = [error(np.where(by_magnitude, weight, 0)), error(np.where(by_input, weight, 0)), error(in_order)]
    assert errors[2] < min(errors[:2])
    assert error(fitted) < errors[2]
    magnitude_fitted = refit(weight, np.where(by_magnitude, weight, 0), by_magnitude, gram)
    assert error(magnitude_fitted) < errors[0]
    assert not fitted[~kept].any()


def test_order_agrees_with_removing_one_row_after_the_other(rows: np.ndarray, weight: np.ndarray) -> None:
    """The same zeros by the definition: each removal is followed by the best update of the rows that come after."""
    gram = (rows.T @ rows).astype(np.float64)
    damped = gram + DAMPING * np.diagonal(gram).mean() * np.eye(K)
    factor = inverse_factor(gram)
    assert factor is not None
    found, kept = prune_in_order(weight, factor, Pattern.parse("unstructured", ""), 0.4)
    column = weight[:, 0].astype(np.float64)
    for k in range(K):
        if not kept[k, 0]:
            inverse = np.linalg.inv(damped[k:, k:])
            column[k:] -= column[k] / inverse[0, 0] * inverse[:, 0]
    assert np.abs(found[:, 0] - column).max() <= TOLERANCE * np.abs(column).max()


def test_channels_that_never_fire_keep_the_fit_finite(weight: np.ndarray) -> None:
    rows = np.zeros((40, K), np.float32)
    rows[:, :20] = np.random.default_rng(0).normal(size=(40, 20))
    kept = Pattern.parse("unstructured", "").kept(np.abs(weight), 0.5)
    assert np.isfinite(refit(weight, np.where(kept, weight, 0), kept, rows.T @ rows)).all()
    nothing = refit(weight, np.where(kept, weight, 0), kept, np.zeros((K, K), np.float32))
    assert np.isfinite(nothing).all()
