from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxslim_llm.passes.quantize.codes.compensate import Grid, compensate
from onnxslim_llm.stats.curvature import inverse_factor, output_error

Array = NDArray[Any]

#: Factors are rounded to float32, and the work is done in it.
TOLERANCE = 1e-3


def _inputs(rows: int, size: int, seed: int) -> Array:
    """Correlated inputs: a few directions are common to all channels."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((4, size)) * 2
    return (rng.standard_normal((rows, 4)) @ mixing + rng.standard_normal((rows, size))).astype(np.float32)


def _range_grid(levels: int) -> Any:
    def fit(rows: Array, start: int) -> Grid:
        low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
        scale = ((high - low) / levels).astype(np.float32)
        return Grid(scale, np.clip(np.rint(-low / scale), 0, levels).astype(np.uint8))

    return fit


def _nearest(weight: Array, block: int, levels: int) -> Array:
    parts = []
    for start in range(0, len(weight), block):
        rows = weight[start : start + block]
        grid = _range_grid(levels)(rows, start)
        codes = np.clip(np.rint(rows / grid.scales) + grid.zeros, 0, levels)
        parts.append((codes - grid.zeros.astype(np.float32)) * grid.scales)
    return np.concatenate(parts)


def _one_at_a_time(weight: Array, gram: Array, block: int, levels: int) -> Array:
    """Optimal brain quantization in its plainest form: the inverse of H is recomputed after every row."""
    work = weight.astype(np.float64)
    done = np.zeros_like(work)
    h = gram.astype(np.float64)
    h = h + 0.01 * np.diag(h).mean() * np.eye(len(h))
    for start in range(0, len(work), block):
        grid = _range_grid(levels)(work[start : start + block].astype(np.float32), start)
        scale, zero = grid.scales.astype(np.float64), grid.zeros.astype(np.float64)
        for k in range(start, min(start + block, len(work))):
            inverse = np.linalg.inv(h[k:, k:])
            done[k] = (np.clip(np.rint(work[k] / scale) + zero, 0, levels) - zero) * scale
            error = (work[k] - done[k]) / inverse[0, 0]
            work[k + 1 :] -= inverse[1:, 0][:, None] * error
    return done


def test_the_factor_is_that_of_the_inverse() -> None:
    x = _inputs(200, 24, 0)
    gram = (x.T @ x).astype(np.float64)
    factor = inverse_factor(gram)
    assert factor is not None
    assert np.allclose(factor, np.triu(factor))
    damped = gram + 0.01 * np.diag(gram).mean() * np.eye(24)
    assert np.allclose(factor.T @ factor, np.linalg.inv(damped), rtol=TOLERANCE, atol=TOLERANCE * 1e-3)


def test_it_does_what_the_plain_algorithm_does() -> None:
    rng = np.random.default_rng(1)
    x, weight = _inputs(300, 32, 1), rng.standard_normal((32, 6)).astype(np.float32)
    gram = x.T @ x
    factor = inverse_factor(gram)
    assert factor is not None
    found = compensate(weight, factor, 16, 15, _range_grid(15)).dequantized(16)
    plain = _one_at_a_time(weight, gram, 16, 15)
    # A tie that rounding decides the other way changes all that follows, so the errors are compared, not the codes.
    ours, theirs = (output_error(weight - w, gram).sum() for w in (found, plain))
    assert ours == pytest.approx(theirs, rel=0.05)


@given(seed=st.integers(0, 1000), bits=st.sampled_from([2, 3, 4]), rows=st.sampled_from([17, 32, 48, 50]))
@settings(max_examples=25)
def test_it_is_better_than_rounding_to_nearest(seed: int, bits: int, rows: int) -> None:
    x = _inputs(4 * rows, rows, seed)
    weight = np.random.default_rng(seed).standard_normal((rows, 32)).astype(np.float32)
    gram = x.T @ x
    factor = inverse_factor(gram)
    assert factor is not None
    coded = compensate(weight, factor, 16, 2**bits - 1, _range_grid(2**bits - 1))
    assert coded.codes.shape == weight.shape
    assert coded.codes.max() < 2**bits
    ours = output_error(weight - coded.dequantized(16), gram).sum()
    assert ours < output_error(weight - _nearest(weight, 16, 2**bits - 1), gram).sum()


def test_channels_that_never_fire_are_rounded_as_they_are() -> None:
    x = _inputs(200, 32, 3)
    x[:, 5] = 0
    weight = np.random.default_rng(3).standard_normal((32, 4)).astype(np.float32)
    factor = inverse_factor(x.T @ x)
    assert factor is not None
    assert np.isfinite(factor).all()
    found = compensate(weight, factor, 32, 15, _range_grid(15)).dequantized(32)
    assert np.isfinite(found).all()


def test_statistics_that_say_nothing_give_no_factor() -> None:
    assert inverse_factor(np.zeros((8, 8))) is None
    assert inverse_factor(np.full((8, 8), np.nan)) is None


def test_few_rows_are_damped() -> None:
    x = _inputs(5, 32, 4)  # rank 5
    factor = inverse_factor(x.T @ x)
    assert factor is not None
    assert np.isfinite(factor).all()
    assert (np.diag(factor) > 0).all()


def test_the_output_error_is_that_of_the_output() -> None:
    rng = np.random.default_rng(5)
    x, error = _inputs(100, 16, 5), rng.standard_normal((16, 3)).astype(np.float32)
    assert np.allclose(output_error(error, x.T @ x), np.square(x @ error).sum(0), rtol=TOLERANCE)


@pytest.mark.parametrize("levels", [7, 15])
def test_pruned_weights_stay_pruned_and_the_others_make_up_for_them(levels: int) -> None:
    rng = np.random.default_rng(0)
    x = _inputs(200, 64, 0)
    weight = rng.standard_normal((64, 8)).astype(np.float32)
    weight[rng.random(weight.shape) < 0.5] = 0
    gram = (x.T @ x).astype(np.float32)
    found = compensate(weight, inverse_factor(gram), 16, levels, _range_grid(levels)).dequantized(16)
    assert (found[weight == 0] == 0).all()
    nearest = _nearest(weight, 16, levels)
    assert output_error(weight - found, gram).sum() < output_error(weight - nearest, gram).sum()
