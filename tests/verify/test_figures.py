from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim_llm.verify.figures import SQNR_CAP_DB, ErrorFigures, ErrorSums, LogitSums, kl_divergence, log_softmax

# Sums over at most a few thousand float64 values: rounding is below this, relative.
RELATIVE = 1e-12


def figures(*pairs: tuple[object, object]) -> ErrorFigures:
    sums = ErrorSums()
    for a, b in pairs:
        sums.add(np.asarray(a), np.asarray(b))
    return sums.figures()


def test_by_hand() -> None:
    found = figures(([3.0, -4.0, 0.0], [3.0, -3.0, 0.5]))
    assert found.max_abs == 1.0
    assert found.absmax == 4.0
    assert found.count == 3
    assert found.sqnr_db == pytest.approx(10 * math.log10(25 / 1.25), rel=RELATIVE)
    assert found.cosine == pytest.approx(21 / (5 * math.sqrt(18.25)), rel=RELATIVE)
    # 1.0 of 4.0 is 0.25; 0.5 at a zero counts against the root mean square sqrt(25 / 3).
    assert found.max_rel == pytest.approx(max(0.25, 0.5 / math.sqrt(25 / 3)), rel=RELATIVE)


def test_equal_outputs() -> None:
    found = figures(([1.0, 2.0], [1.0, 2.0]))
    assert (found.max_abs, found.max_rel, found.sqnr_db, found.cosine) == (0.0, 0.0, SQNR_CAP_DB, 1.0)
    assert figures(([0.0], [0.0])).cosine == 1.0
    assert figures(([], [])).count == 0


def test_noise_over_silence() -> None:
    found = figures(([0.0, 0.0], [1.0, 0.0]))
    assert found.sqnr_db == -SQNR_CAP_DB
    assert found.max_rel == math.inf
    assert found.cosine == 0.0


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=40), st.integers(1, 39))
@settings(max_examples=50, deadline=None)
def test_parts_add_up(values: list[float], cut: int) -> None:
    a = np.array(values)
    b = a + np.linspace(-1, 1, len(a))
    whole, parts = figures((a, b)), figures((a[:cut], b[:cut]), (a[cut:], b[cut:]))
    assert parts.max_abs == whole.max_abs
    assert parts.count == whole.count
    assert parts.sqnr_db == pytest.approx(whole.sqnr_db, rel=1e-9, abs=1e-9)
    assert parts.cosine == pytest.approx(whole.cosine, rel=1e-9)


def test_blocks_do_not_change_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 50, 20))
    whole = figures((a, b))
    monkeypatch.setattr("onnxslim_llm.verify.figures._BLOCK", 7)
    blocked = figures((a, b))
    assert blocked.max_rel == pytest.approx(whole.max_rel, rel=1e-9)
    assert blocked.sqnr_db == pytest.approx(whole.sqnr_db, rel=1e-9)


def test_integers_booleans_and_small_floats() -> None:
    assert figures((np.array([1, 5], np.int64), np.array([1, 7], np.int64))).max_abs == 2
    assert figures((np.array([True, False]), np.array([True, True]))).max_abs == 1
    assert figures((np.array([1.5], ml_dtypes.bfloat16), np.array([2.0], ml_dtypes.bfloat16))).max_abs == 0.5
    # float16 sums overflow beyond 65504 unless they are made in float64
    assert math.isfinite(figures((np.full(9, 6e4, np.float16), np.full(9, -6e4, np.float16))).sqnr_db)


def test_non_finite_values_are_counted_not_averaged() -> None:
    sums = ErrorSums()
    a = np.array([1.0, 2.0, np.inf, np.nan, -np.inf, np.inf])
    b = np.array([1.5, np.nan, np.inf, 3.0, 0.0, -np.inf])
    sums.add(a, b)
    assert sums.nonfinite == 3  # NaN for 2, 0 for -inf, -inf for inf
    assert sums.source_nan == 1
    assert sums.figures().count == 1
    assert sums.figures().max_abs == 0.5


def test_log_softmax_survives_large_logits() -> None:
    assert np.exp(log_softmax(np.array([[1000.0, 1000.0]]))).tolist() == [[0.5, 0.5]]


def test_kl_by_hand() -> None:
    p, q = np.array([[0.5, 0.5]]), np.array([[0.9, 0.1]])
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert kl_divergence(np.log(p), np.log(q))[0] == pytest.approx(expected, rel=RELATIVE)
    assert kl_divergence(np.log(q), np.log(p))[0] != pytest.approx(expected)


def test_kl_ignores_a_shift_and_is_never_negative() -> None:
    logits = np.random.default_rng(0).standard_normal((50, 30)) * 10
    assert kl_divergence(logits, logits + 7).max() <= 1e-12
    assert kl_divergence(logits, logits).min() >= 0
    assert kl_divergence(logits[:0], logits[:0]).shape == (0,)


def test_logit_sums() -> None:
    sums = LogitSums()
    assert sums.kl_mean is None
    assert sums.top1_agreement is None
    sums.add(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[2.0, 0.0], [3.0, 1.0]]))
    sums.add(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[1.0, 0.0], [np.nan, 0.0]]))
    assert sums.tokens == 3
    assert sums.top1_agreement == pytest.approx(2 / 3)
    assert sums.kl_mean == pytest.approx(sums.kl.sum() / 3)
    assert sums.kl[2] == 0


def test_logit_sums_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 30, 11))
    whole = LogitSums()
    whole.add(a, b)
    monkeypatch.setattr("onnxslim_llm.verify.figures._BLOCK", 25)
    blocked = LogitSums()
    blocked.add(a, b)
    assert np.array_equal(whole.kl, blocked.kl)
    assert blocked.top1_agreement == whole.top1_agreement
