"""Every instruction set gives the bits of the numpy reference."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim_llm.custom_ops import native, reference
from onnxslim_llm.custom_ops.layout import BlockSpec, Layout, TileBuffers, column_alignment

Array = np.ndarray[Any, Any]

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
STRIDES = ("row-major", "column-major", "every other", "reversed", "unaligned")
CONTENTS = ("normal", "zero blocks", "one value", "halves", "huge", "tiny", "with NaN", "positive")

specs = st.builds(
    BlockSpec,
    bits=st.sampled_from([2, 3, 4, 8]),
    block=st.sampled_from([16, 32, 64, -1]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["float32", "float16"]),
)


def contents(kind: str, rows: int, columns: int, rng: np.random.Generator) -> Array:
    values = rng.standard_normal((rows, columns))
    if kind == "zero blocks":
        values[: rows // 2] = 0
    elif kind == "one value":
        values[:] = rng.standard_normal()
    elif kind == "halves":  # many exact ties
        values = rng.integers(-17, 18, (rows, columns)) / 2
    elif kind == "huge":
        values *= 1e38
    elif kind == "tiny":
        values *= 10.0 ** rng.integers(-46, -36)
    elif kind == "with NaN":
        values[rng.random((rows, columns)) < 0.05] = rng.choice([np.nan, np.inf, -np.inf])
    elif kind == "positive":
        values = np.abs(values) + 3
    return values


def strided(values: Array, kind: str) -> Array:
    """The same matrix with other strides, so that reading past it or beside it would show."""
    rows, columns = values.shape
    if kind == "column-major":
        return np.asfortranarray(values)
    if kind == "every other":
        wide = np.full((2 * rows, 3 * columns), np.nan, values.dtype)
        wide[::2, ::3] = values
        return wide[::2, ::3]
    if kind == "reversed":
        return np.ascontiguousarray(values[::-1, ::-1])[::-1, ::-1]
    if kind == "unaligned":
        raw = np.zeros(values.nbytes + 1, np.uint8)
        raw[1:] = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
        return raw[1:].view(values.dtype).reshape(rows, columns)
    return np.ascontiguousarray(values)


def assert_equal_bits(actual: TileBuffers, expected: TileBuffers) -> None:
    np.testing.assert_array_equal(actual.codes, expected.codes)
    np.testing.assert_array_equal(actual.scales.view(np.uint8), expected.scales.view(np.uint8))
    if expected.zero_points is not None:
        np.testing.assert_array_equal(actual.zero_points, expected.zero_points)


@given(
    spec=specs,
    method=st.sampled_from(["rtn", "search", "hqq"]),
    layout=st.sampled_from(list(Layout)),
    rows=st.integers(1, 90),
    columns=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    stride=st.sampled_from(STRIDES),
    content=st.sampled_from(CONTENTS),
    weighted=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_native_equals_reference(
    isa: str,
    spec: BlockSpec,
    method: str,
    layout: Layout,
    rows: int,
    columns: int,
    dtype: type,
    stride: str,
    content: str,
    weighted: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        weight = strided(contents(content, rows, columns, rng).astype(dtype), stride)
    importance = rng.random(rows).astype(np.float32) if weighted else None
    expected, actual = (TileBuffers.allocate(spec, layout, rows, columns) for _ in range(2))
    wanted = reference.quantize_into(weight, expected, 0, method, importance)
    found = native.quantize_into(weight, actual, 0, method, importance, isa)
    assert found == wanted
    assert_equal_bits(actual, expected)


@given(spec=specs, layout=st.sampled_from(list(Layout)), rows=st.integers(1, 70), data=st.data())
@settings(max_examples=60, deadline=None)
def test_tiles_equal_the_whole(isa: str, spec: BlockSpec, layout: Layout, rows: int, data: st.DataObject) -> None:
    columns = data.draw(st.integers(1, 70))
    step = column_alignment(spec, layout, rows, columns) * data.draw(st.integers(1, 5))
    weight = np.random.default_rng(rows * columns).standard_normal((rows, columns)).astype(np.float32)
    whole, tiled, by_reference = (TileBuffers.allocate(spec, layout, rows, columns) for _ in range(3))
    native.quantize_into(weight, whole, 0, "rtn", None, isa)
    for first in range(0, columns, step):
        tile = weight[:, first : first + step]
        native.quantize_into(tile, tiled, first, "rtn", None, isa)
        reference.quantize_into(tile, by_reference, first, "rtn", None)
    assert_equal_bits(tiled, whole)
    assert_equal_bits(by_reference, whole)


@pytest.mark.parametrize("method", ["search", "hqq"])
@pytest.mark.parametrize("layout", Layout)
def test_a_weight_wider_than_the_walk(isa: str, layout: Layout, method: str) -> None:
    """More columns than a stripe and more rows than a chunk of the native walk."""
    spec = BlockSpec(4, 32, symmetric=False)
    weight = np.random.default_rng(0).standard_normal((300, 530)).astype(np.float16)
    expected, actual = (TileBuffers.allocate(spec, layout, *weight.shape) for _ in range(2))
    wanted = reference.quantize_into(weight, expected, 0, method, None)
    assert native.quantize_into(weight, actual, 0, method, None, isa) == wanted
    assert_equal_bits(actual, expected)
