from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxslim_llm.passes.quantize.codes.compensate import Coded
from onnxslim_llm.passes.quantize.codes.polish import polish
from onnxslim_llm.stats.curvature import output_error

Array = NDArray[Any]

#: Errors are worked out in float32, in another order.
ROUNDING = 1e-4


def _as_they_are(scales: Array) -> Array:
    return scales.astype(np.float32)


def _start(rows: int, bits: int, seed: int) -> tuple[Array, Array, Coded]:
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((4, rows)) * 2
    x = rng.standard_normal((4 * rows, 4)) @ mixing + rng.standard_normal((4 * rows, rows))
    weight = rng.standard_normal((rows, 8)).astype(np.float32)
    levels, scales, zeros, codes = (1 << bits) - 1, [], [], []
    for begin in range(0, rows, 16):
        part = weight[begin : begin + 16]
        scale = (np.maximum(part.max(0), 0) - np.minimum(part.min(0), 0)) / levels
        zero = np.clip(np.rint(-np.minimum(part.min(0), 0) / scale), 0, levels)
        codes.append(np.clip(np.rint(part / scale) + zero, 0, levels))
        scales.append(scale)
        zeros.append(zero)
    coded = Coded(np.concatenate(codes).astype(np.uint8), np.stack(scales), np.stack(zeros).astype(np.uint8))
    return weight, (x.T @ x).astype(np.float32), coded


@given(seed=st.integers(0, 1000), bits=st.sampled_from([2, 3, 4]), rows=st.sampled_from([16, 40, 64]))
@settings(max_examples=25)
def test_no_column_becomes_worse(seed: int, bits: int, rows: int) -> None:
    weight, gram, coded = _start(rows, bits, seed)
    better = polish(weight, coded, gram, 16, (1 << bits) - 1, _as_they_are)
    assert better.codes.max() < 1 << bits
    before, after = (output_error(weight - c.dequantized(16), gram) for c in (coded, better))
    assert (after <= before * (1 + ROUNDING)).all()
    assert after.sum() < before.sum()


def test_it_ends_where_no_single_code_is_better() -> None:
    weight, gram, coded = _start(32, 3, 5)
    found = polish(weight, coded, gram, 16, 7, _as_they_are, sweeps=50)
    least = output_error(weight - found.dequantized(16), gram)
    for k in range(32):
        for step in (-1, 1):
            codes = found.codes.astype(int)
            codes[k] += step
            usable = (codes[k] >= 0) & (codes[k] <= 7)
            other = Coded(np.clip(codes, 0, 7).astype(np.uint8), found.scales, found.zeros)
            error = output_error(weight - other.dequantized(16), gram)
            assert (error[usable] >= least[usable] * (1 - ROUNDING)).all()


def test_scales_are_the_stored_ones() -> None:
    weight, gram, coded = _start(32, 4, 7)
    found = polish(weight, coded, gram, 16, 15, lambda s: s.astype(np.float16).astype(np.float32))
    assert np.array_equal(found.scales, found.scales.astype(np.float16).astype(found.scales.dtype))


@given(seed=st.integers(0, 1000), bits=st.sampled_from([3, 4]))
@settings(max_examples=15)
def test_what_is_zero_stays_zero(seed: int, bits: int) -> None:
    weight, gram, coded = _start(48, bits, seed)
    pruned = np.random.default_rng(seed).random(weight.shape) < 0.5
    weight[pruned] = 0
    zeros = np.repeat(coded.zeros, 16, axis=0)
    start = Coded(np.where(pruned, zeros, coded.codes), coded.scales, coded.zeros)
    found = polish(weight, start, gram, 16, (1 << bits) - 1, _as_they_are)
    assert (found.dequantized(16)[pruned] == 0).all()
    assert not np.array_equal(found.codes, start.codes)
