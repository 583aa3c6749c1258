"""Calibrators against what is computed from all values at once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxslim_llm.stats.grid import Grid, Range, grid_of
from onnxslim_llm.stats.histogram import FloatHistogram
from onnxslim_llm.stats.ranges import CALIBRATORS, CalibratorName, make_collector

#: A bucket is 2^-8 of its values wide at most: an edge is so far from the value that was looked for.
BUCKET = 2.0**-8
#: Mean squared errors from buckets: values move by half a bucket, a step at the largest value is half a bucket.
MSE_SLACK = 0.05

UINT8, INT8 = grid_of("uint8", False), grid_of("int8", True)


def heavy(seed: int, size: int = 60_000) -> NDArray[np.float32]:
    """Activations as decoders have them: normal, with a few values that are far larger."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(size).astype(np.float32)
    values[:7] *= 40
    return values


def coded(values: NDArray[np.float32], grid: Grid, taken: Range) -> NDArray[np.float64]:
    scale, zero = grid.parameters(taken)
    codes = np.clip(np.rint(values.astype(np.float64) / float(scale)) + zero, grid.lowest, grid.highest)
    return (codes - zero) * float(scale)


def ranged(name: CalibratorName, values: NDArray[np.float32], grid: Grid, pieces: int = 13) -> Range:
    collector = make_collector(name)
    for piece in np.array_split(values, pieces):
        collector.add(piece)
    return collector.range(grid)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
def test_a_histogram_does_not_depend_on_order_or_pieces(values: list[float]) -> None:
    array = np.array(values, np.float32)
    shuffled = array.copy()
    np.random.default_rng(len(values)).shuffle(shuffled)
    whole, pieces = FloatHistogram(), FloatHistogram()
    whole.add(array)
    for value in shuffled:
        pieces.add(value[None])
    assert whole.total == pieces.total == len(values)
    for mine, theirs in zip(whole.buckets(), pieces.buckets(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_every_value_lies_in_its_bucket() -> None:
    values = np.concatenate([heavy(1), np.zeros(10, np.float32), np.float32([3.4e38, -1e-40])])
    histogram = FloatHistogram()
    histogram.add(values)
    lower, upper, counts = histogram.buckets()
    for low, high, count in zip(lower, upper, counts, strict=True):
        inside = (values >= low) & (values < high) if low >= 0 else (values > low) & (values <= high)
        if low != high:
            assert np.count_nonzero(inside) == count
    assert counts.sum() == len(values)


def test_minmax_is_the_range_of_all_values() -> None:
    values = heavy(2)
    assert ranged("minmax", values, UINT8) == Range(float(values.min()), float(values.max()))


@pytest.mark.parametrize("grid", [UINT8, INT8])
def test_percentiles_are_those_of_all_values(grid: Grid) -> None:
    values = heavy(3)
    found = ranged("percentile", values, grid)
    if grid.symmetric:
        wanted = np.quantile(np.abs(values), 0.9999, method="inverted_cdf")
        assert wanted <= found.high <= wanted * (1 + BUCKET)
        assert found.low == -found.high
    else:
        left_out = len(values) // 20_000  # 0.005 % on each side
        low, high = np.sort(values)[[left_out, -left_out - 1]]
        assert high <= found.high <= high * (1 + BUCKET)
        assert low * (1 + BUCKET) <= found.low <= low


@pytest.mark.parametrize("grid", [UINT8, INT8])
def test_mse_finds_what_a_search_over_all_values_finds(grid: Grid) -> None:
    values = heavy(4)
    found = ranged("mse", values, grid)
    low, high = float(values.min()), float(values.max())
    factors = 2.0 ** (-np.arange(0, 41, 2) / 8)
    ends = itertools.product(factors, factors) if not grid.symmetric else ((f, f) for f in factors)
    best = min(np.mean((coded(values, grid, Range(low * a, high * b)) - values) ** 2) for a, b in ends)
    assert np.mean((coded(values, grid, found) - values) ** 2) <= best * (1 + MSE_SLACK)


def test_the_expected_error_is_the_error() -> None:
    values = heavy(5)
    for name, grid in itertools.product(("mse", "percentile"), (UINT8, INT8, grid_of("int8", False))):
        collector = make_collector(name)
        collector.add(values)
        taken = collector.range(grid)
        exact = np.mean((coded(values, grid, taken) - values) ** 2)
        assert collector.error(grid, taken) == pytest.approx(exact, rel=MSE_SLACK)


def kl_of_values(values: NDArray[np.float32], limit: float, levels: int) -> float:
    """KL divergence of Migacz's calibrator, from all values and evenly spaced bins four to a level."""
    magnitudes = np.abs(values[values != 0]).astype(np.float64)
    bins = np.linspace(0, limit, levels * 4 + 1)
    kept = np.histogram(magnitudes[magnitudes < limit], bins)[0].astype(np.float64)
    clipped = kept.copy()
    clipped[-1] += np.count_nonzero(magnitudes >= limit)
    spread = np.zeros_like(kept)
    for level in range(levels):
        part = slice(4 * level, 4 * level + 4)
        filled = kept[part] > 0
        if filled.any():
            spread[part][filled] = kept[part].sum() / filled.sum()
    p, q = clipped / clipped.sum(), np.maximum(spread / spread.sum(), 1e-12)
    some = p > 0
    return float(np.sum(p[some] * np.log(p[some] / q[some])))


def test_entropy_clips_what_the_divergence_of_all_values_says() -> None:
    values = heavy(6)
    found = ranged("entropy", values, INT8)
    whole = float(np.abs(values).max())
    limits = whole * 2.0 ** (-np.arange(41) / 8)
    divergences = [kl_of_values(values, limit, 127) for limit in limits]
    # bins differ, so the same place is not asked for, but one that is as good up to the noise of finite bins
    at_found = kl_of_values(values, found.high, 127)
    assert at_found <= min(divergences) + 0.1 * (divergences[0] - min(divergences))
    assert found.high < whole / 4


def test_a_moving_average_forgets_single_outliers() -> None:
    quiet = [np.linspace(-1, 1, 100, dtype=np.float32)] * 30
    collector = make_collector("moving_average")
    for piece in [*quiet, quiet[0] * 100, *quiet]:
        collector.add(piece)
    average = 1.0 + 99 * 0.1 * 0.9**30
    assert collector.range(UINT8).high == pytest.approx(average, rel=1e-6)
    assert collector.whole == Range(-100.0, 100.0)


@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(name: CalibratorName, bad: float) -> None:
    collector = make_collector(name)
    with pytest.raises(FloatingPointError, match="NaN" if np.isnan(bad) else "infinite"):
        collector.add(np.array([0.0, bad], np.float32))


@pytest.mark.parametrize("name", CALIBRATORS)
def test_every_calibrator_says_when_there_is_no_range(name: CalibratorName) -> None:
    collector = make_collector(name)
    assert collector.range(UINT8).problem == "its range is zero"
    collector.add(np.zeros(5, np.float16))
    assert collector.range(UINT8).problem == "its range is zero"


@pytest.mark.parametrize("name", CALIBRATORS)
def test_one_sided_values_get_all_codes(name: CalibratorName) -> None:
    values = np.abs(heavy(7))
    scale, zero = UINT8.parameters(ranged(name, values, UINT8))
    assert zero == 0
    assert float(scale) * 255 <= values.max() * (1 + BUCKET)


@pytest.mark.parametrize(
    ("kind", "symmetric", "zero"),
    [("uint8", True, 128), ("int8", True, 0), ("uint16", True, 32768), ("int16", True, 0), ("int4", True, 0)],
)
def test_symmetric_codes_have_their_zero_in_the_middle(kind: str, symmetric: bool, zero: int) -> None:
    grid = grid_of(kind, symmetric)  # type: ignore[arg-type]
    scale, found = grid.parameters(Range(-2.0, 1.0))
    assert found == zero
    assert float(scale) == pytest.approx(2.0 / (grid.levels // 2))


@pytest.mark.parametrize("kind", ["uint8", "int8", "uint16", "int16"])
def test_zero_is_exact_and_the_ends_are_reached(kind: str) -> None:
    grid = grid_of(kind, False)  # type: ignore[arg-type]
    taken = Range(-1.0, 3.0)
    values = np.float32([-1.0, 0.0, 3.0])
    found = coded(values, grid, taken)
    assert found[1] == 0
    np.testing.assert_allclose(found, values, atol=2.0 * 4.0 / grid.levels)


def test_ranges_that_make_no_scale_are_named() -> None:
    assert Range(0.0, 0.0).problem == "its range is zero"
    assert Range(0.0, np.inf).problem == "its range is not finite"
    assert Range(np.nan, 1.0).problem == "its range is not finite"
    assert "wider" in Range(-3e38, 3e38).problem
    with pytest.raises(ValueError, match="range is zero"):
        UINT8.parameters(Range(0.0, 0.0))
