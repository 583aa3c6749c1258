"""Float16 scales are only chosen where float16 can hold them."""

from __future__ import annotations

import numpy as np
import pytest

from onnxslim_llm.ir.weights import ArrayWeight
from onnxslim_llm.passes.quantize.codes.scale_range import half_holds_scales


@pytest.mark.parametrize(
    ("size", "bits", "holds"),
    [(0.02, 8, True), (0.02, 4, True), (1e-4, 4, True), (1e-4, 8, False), (1e-12, 4, False), (1e7, 8, False)],
)
def test_size_of_weights_decides(size: float, bits: int, holds: bool) -> None:
    values = np.random.default_rng(0).standard_normal((64, 64)) * size
    assert half_holds_scales(ArrayWeight(values.astype(np.float32)), bits) == holds


def test_an_outlier_zeros_and_nan_do_not_decide() -> None:
    values = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    values[0, :3] = 1e30, 0, np.nan
    assert half_holds_scales(ArrayWeight(values), 8)
    assert half_holds_scales(ArrayWeight(np.zeros((64, 64), np.float32)), 8)
