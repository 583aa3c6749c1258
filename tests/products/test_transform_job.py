"""Steps along the axes of weights: the numbers, the tiles, and that they become one piece of work."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxslim_llm.ir.weights import ArrayWeight, DerivedWeight
from onnxslim_llm.passes.quantize.rotation.rotate_step import Rotate
from onnxslim_llm.passes.quantize.rotation.rotation import Rotation
from onnxslim_llm.products import transform_job
from onnxslim_llm.products.transform_job import Centre, Scale, Step, TransformJob, transformed

Array = np.ndarray[Any, Any]

#: Three float32 operations on numbers around one, one of them a sum of 12.
TOLERANCE = 16 * 2**-23

ROTATION = Rotation(12, 4)
FACTOR = np.linspace(0.5, 2.0, 12)


def _weight(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("tile_bytes", [1, 200, 1 << 20])
def test_steps_are_those_of_numpy(axis: int, tile_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transform_job, "_TILE_BYTES", tile_bytes)
    weight = _weight(12, 24) if axis == 0 else _weight(24, 12)
    by_row = weight if axis == 1 else weight.T
    cases: list[tuple[Step, Array]] = [
        (Scale(axis, FACTOR), by_row * FACTOR),
        (Centre(axis), by_row - by_row.mean(axis=1, keepdims=True)),
        (Rotate(axis, ROTATION), by_row @ ROTATION.matrix),
    ]
    for step, expected in cases:
        found = transformed(ArrayWeight(weight), "w", step).load()
        assert np.abs(found - (expected if axis == 1 else expected.T)).max() < TOLERANCE, step


@pytest.mark.parametrize("tile_bytes", [1, 1 << 20])
def test_both_axes(tile_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transform_job, "_TILE_BYTES", tile_bytes)
    weight = _weight(12, 24)
    found = transformed(ArrayWeight(weight), "w", Scale(0, FACTOR), Rotate(0, ROTATION), Rotate(1, ROTATION)).load()
    scaled = ROTATION.matrix.T @ (FACTOR[:, None] * weight)
    expected = (scaled.reshape(12, 2, 12) @ ROTATION.matrix).reshape(12, 24)
    assert np.abs(found - expected).max() < TOLERANCE


def test_a_vector() -> None:
    vector = _weight(12)
    found = transformed(ArrayWeight(vector), "b", Scale(0, FACTOR), Rotate(0, ROTATION)).load()
    assert np.abs(found - (vector * FACTOR) @ ROTATION.matrix).max() < TOLERANCE


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_short_type_is_rounded_once(dtype: Any) -> None:
    weight = _weight(24, 12).astype(dtype)
    found = transformed(ArrayWeight(weight), "w", Scale(1, FACTOR), Rotate(1, ROTATION)).load()
    assert found.dtype == weight.dtype
    exact = (weight.astype(np.float64) * FACTOR) @ ROTATION.matrix
    step = np.finfo(np.float16).eps if dtype == np.float16 else 2**-7
    assert (np.abs(found.astype(np.float64) - exact) <= 0.51 * step * np.abs(exact) + TOLERANCE).all()


def test_later_steps_join_the_same_work() -> None:
    source = ArrayWeight(_weight(24, 12))
    twice = transformed(transformed(source, "w", Scale(1, FACTOR)), "w", Rotate(1, ROTATION))
    assert isinstance(twice, DerivedWeight)
    assert isinstance(twice.job, TransformJob)
    assert twice.job.inputs == (source,)
    assert len(twice.job.steps) == 2
    once = transformed(source, "w", Scale(1, FACTOR), Rotate(1, ROTATION))
    assert once.key == twice.key
    assert once.key != transformed(source, "w", Rotate(1, ROTATION), Scale(1, FACTOR)).key
