"""Codes of 5 and 6 bits as two planes: exact in the sum, and as fine as their bits promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxslim_llm.concepts.block_weights import WeightScheme
from onnxslim_llm.ir.weights import ArrayWeight
from onnxslim_llm.ir.weights.jobs import derive
from onnxslim_llm.passes.quantize.codes.calibrated_job import PlaneJob
from onnxslim_llm.passes.quantize.codes.planes import plane_of, rounded, zero_of

Array = NDArray[Any]

#: Sums of two float32 products of small integers and scales.
TOLERANCE = 1e-6


def _weight(rows: int, columns: int, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@given(seed=st.integers(0, 100), bits=st.sampled_from([5, 6]), rows=st.sampled_from([16, 40, 64]))
@settings(max_examples=25)
def test_both_planes_together_are_the_weight(seed: int, bits: int, rows: int) -> None:
    scheme = WeightScheme(bits, 32, True, "search", "float16")
    coded = rounded(_weight(rows, 5, seed), scheme, None)
    assert coded.codes.max() < 1 << bits
    assert (coded.zeros == zero_of(bits)).all()
    planes = [plane_of(coded, bits, index).dequantized(32) for index in (0, 1)]
    assert np.allclose(planes[0] + planes[1], coded.dequantized(32), atol=TOLERANCE)


@pytest.mark.parametrize("bits", [5, 6])
def test_a_bit_more_halves_the_error(bits: int) -> None:
    weight = _weight(256, 32, 1)
    errors = {}
    for width in (bits, 5 if bits == 6 else 6):
        scheme = WeightScheme(width, 64, True, "search", "float32")
        errors[width] = float(np.square(weight - rounded(weight, scheme, None).dequantized(64)).mean())
    # Four times less in theory; shorter ranges are worth a little more where there are fewer codes.
    assert 3 < errors[5] / errors[6] < 5


@pytest.mark.parametrize("layout", ["blocked_kn", "blocked_nk", "nbits"])
def test_jobs_store_the_planes_of_the_same_codes(layout: str) -> None:
    weight = _weight(96, 32, 2)
    scheme = WeightScheme(6, 32, True, "search", "float32")
    total = np.zeros_like(weight)
    for index, bits in enumerate((4, 2)):
        job = PlaneJob(ArrayWeight(weight), 0, scheme, "W", index, None)
        codes, scales = (w.load() for w in derive(job))  # signed, in the first layout
        total += codes.astype(np.float32) * np.repeat(scales, 32, axis=0)
        other = derive(job.with_layout(layout))[1].load()  # type: ignore[arg-type]
        assert np.array_equal(scales, other if other.shape == scales.shape else other.T)
        assert job.scheme.bits == bits
    assert np.allclose(total, rounded(weight, scheme, None).dequantized(32), atol=TOLERANCE)
