"""Codes for inputs that have drifted: against a straightforward reference, and never worse on what was held out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxslim_llm.concepts.block_weights import WeightScheme
from onnxslim_llm.passes.quantize.codes.coding import InputKnowledge, best_codes, nearest_codes
from onnxslim_llm.passes.quantize.codes.compensate import Coded
from onnxslim_llm.passes.quantize.codes.recode import recoded
from onnxslim_llm.stats.curvature import DAMPING, inverse_factor

Array = np.ndarray[Any, Any]
K, N, ROWS = 48, 24, 600
#: Codes of 8 bits: their steps are 1/128 of the largest weight of a block, and least squares finds the middle of them.
FINE = 0.02


def _drifted(seed: int) -> tuple[Array, Array, Array]:
    """Return X~, Y and W: the input has lost a tenth of itself, and the output is to have something else added."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).standard_normal((K, K)) / 4
    was = rng.standard_normal((ROWS, K)) @ mixing + rng.standard_normal((ROWS, K)) / 4
    now = was + 0.1 * np.tanh(was @ mixing) + 0.02 * rng.standard_normal((ROWS, K))
    weight = np.random.default_rng(8).standard_normal((K, N)) / 7
    return now, was @ weight + 0.2 * np.tanh(now[:, :N]), weight.astype(np.float32)


def _known(fit: Array, held: Array) -> InputKnowledge:
    grams = [part.T @ part for part in (fit, held)]
    importance = np.square(fit).mean(axis=0).astype(np.float32)
    return InputKnowledge(importance, inverse_factor(grams[0]), *(gram.astype(np.float32) for gram in grams))


def _pulls(weight: Array, *parts: tuple[Array, Array]) -> list[Array]:
    return [(now.T @ (wanted - now @ weight)).astype(np.float32) for now, wanted in parts]


@pytest.mark.parametrize(("bits", "symmetric"), [(3, False), (4, False), (4, True), (6, True)])
def test_no_column_is_worse_on_rows_held_out_and_most_are_better(bits: int, symmetric: bool) -> None:
    (fit, aim, weight), (held, wanted, _) = _drifted(0), _drifted(1)
    scheme = WeightScheme(bits, 16, symmetric, "calibrated", "float16")
    known = _known(fit, held)
    old, _ = best_codes(weight, scheme, known)
    new, better = recoded(weight, old, scheme, known, *_pulls(weight, (fit, aim), (held, wanted)))
    errors = [np.square(wanted - held @ coded.dequantized(16)).sum(axis=0) for coded in (old, new)]
    assert (errors[1] <= errors[0]).all()
    assert better.mean() > 0.9
    assert errors[1].sum() < 0.6 * errors[0].sum()


def test_fine_codes_are_the_least_squares_solution() -> None:
    (fit, aim, weight), (held, wanted, _) = _drifted(0), _drifted(1)
    scheme = WeightScheme(8, 16, False, "calibrated", "float32")
    new, _ = recoded(
        weight,
        nearest_codes(weight, scheme),
        scheme,
        _known(fit, held),
        *_pulls(weight, (fit, aim), (held, wanted)),
    )
    gram = fit.T @ fit
    damped = gram + DAMPING * np.diagonal(gram).mean() * np.eye(K)
    reference = weight + np.linalg.solve(damped, fit.T @ (aim - fit @ weight))
    found = new.dequantized(16)
    assert np.linalg.norm(found - reference) < FINE * np.linalg.norm(reference)
    assert np.linalg.norm(found - reference) < 0.2 * np.linalg.norm(weight - reference)


def test_what_was_pruned_stays_zero() -> None:
    (fit, aim, weight), (held, wanted, _) = _drifted(0), _drifted(1)
    weight[::3] = 0
    scheme = WeightScheme(4, 16, False, "calibrated", "float16")
    known = _known(fit, held)
    new, better = recoded(
        weight, best_codes(weight, scheme, known)[0], scheme, known, *_pulls(weight, (fit, aim), (held, wanted))
    )
    assert better.any()
    assert not new.dequantized(16)[::3].any()


def test_codes_stay_where_held_out_rows_say_that_they_are_better() -> None:
    (fit, aim, weight), (held, _, _) = _drifted(0), _drifted(1)
    scheme = WeightScheme(8, 16, False, "calibrated", "float32")
    old = nearest_codes(weight, scheme)
    pulls = _pulls(weight, (fit, aim), (held, held @ old.dequantized(16)))  # there, the old codes are without error
    new, better = recoded(weight, old, scheme, _known(fit, held), *pulls)
    assert not better.any()
    assert isinstance(new, Coded)
    np.testing.assert_array_equal(new.codes, old.codes)
