"""What quantize_tile promises, whichever code does the work."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxslim_llm.custom_ops as custom_ops
from onnxslim_llm.custom_ops import native
from onnxslim_llm.custom_ops.packing import unpack
from onnxslim_llm.custom_ops.quantize import (
    BlockSpec,
    Layout,
    Method,
    TileBuffers,
    TileResult,
    column_alignment,
    quantize_tile,
)
from onnxslim_llm.custom_ops.reference import dequantize

Array = np.ndarray[Any, Any]

# w / scale, the product with the scale and the difference are each rounded once to float32 (2^-24 relative); codes are
# below 2^8, so half a step can be exceeded by at most 2^8 * 3 * 2^-24 of a step.
STEP_SLACK = 2**8 * 3 * 2**-24
# Block errors are sums of up to 256 float32 terms in the worst order: 256 * 2^-24 relative.
ERROR_SLACK = 256 * 2**-24

specs = st.builds(
    BlockSpec,
    bits=st.sampled_from([2, 3, 4, 8]),
    block=st.sampled_from([16, 32, 128, -1]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["float32", "float16"]),
)


def normal(rows: int, columns: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_t(4, (rows, columns)).astype(np.float32)


def by_row(per_block: Array, spec: BlockSpec, rows: int) -> Array:
    return np.repeat(per_block.astype(np.float64), spec.block_rows(rows), axis=0)[:rows]


def squared_error(weight: Array, result: TileResult) -> float:
    return float(((weight.astype(np.float64) - dequantize(result.buffers)) ** 2).sum())


@given(spec=specs, rows=st.integers(1, 200), columns=st.integers(1, 20), layout=st.sampled_from(list(Layout)))
@settings(max_examples=100, deadline=None)
def test_nearest_code_for_the_stored_scale(spec: BlockSpec, rows: int, columns: int, layout: Layout) -> None:
    weight = normal(rows, columns, rows)
    result = quantize_tile(weight, spec, layout=layout)
    codes, scales, _ = unpack(result.buffers)
    inside = (codes > 0) & (codes < 2**spec.bits - 1)
    steps = np.abs(weight - dequantize(result.buffers))[inside] / np.abs(by_row(scales, spec, rows))[inside]
    assert (steps <= 0.5 + STEP_SLACK).all()


@given(spec=specs, rows=st.integers(1, 200), columns=st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_reported_error_is_the_error(spec: BlockSpec, rows: int, columns: int) -> None:
    weight = heavy_tailed(rows, columns, rows)
    for method in get_args(Method):
        result = quantize_tile(weight, spec, method)
        assert result.sq_error == pytest.approx(squared_error(weight, result), rel=1e-5, abs=1e-12)
        assert result.sq_weight == pytest.approx((weight.astype(np.float64) ** 2).sum(), rel=1e-6)


@given(spec=specs, rows=st.integers(1, 300), columns=st.integers(1, 20), weighted=st.booleans())
@settings(max_examples=100, deadline=None)
def test_search_is_never_worse_than_rtn(spec: BlockSpec, rows: int, columns: int, weighted: bool) -> None:
    weight = heavy_tailed(rows, columns, rows)
    importance = np.random.default_rng(rows).gamma(0.5, size=rows).astype(np.float32) if weighted else np.ones(rows)
    errors = {}
    for method in ("rtn", "search"):
        result = quantize_tile(weight, spec, method, importance)
        difference = weight.astype(np.float64) - dequantize(result.buffers)
        errors[method] = (importance[:, None] * difference**2).sum(axis=0)
    assert (errors["search"] <= errors["rtn"] * (1 + ERROR_SLACK) + 1e-12).all()


def roots_of_errors(weight: Array, result: TileResult, importance: Array | None = None) -> Array:
    """What "hqq" lowers, [columns]; differences in float32, as in the quantizer, because roots magnify small ones."""
    roots = np.sqrt(np.abs(weight - dequantize(result.buffers)).astype(np.float64))
    return (roots if importance is None else importance[:, None] * roots).sum(axis=0)


@given(spec=specs, rows=st.integers(1, 300), columns=st.integers(1, 20), weighted=st.booleans())
@settings(max_examples=100, deadline=None)
def test_hqq_is_never_worse_than_rtn(spec: BlockSpec, rows: int, columns: int, weighted: bool) -> None:
    weight = heavy_tailed(rows, columns, rows)
    importance = np.random.default_rng(rows).gamma(0.5, size=rows).astype(np.float32) if weighted else None
    nearest, split = (quantize_tile(weight, spec, method, importance) for method in ("rtn", "hqq"))
    allowed = roots_of_errors(weight, nearest, importance) * (1 + 2 * ERROR_SLACK)
    assert (roots_of_errors(weight, split, importance) <= allowed).all()


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.87), (3, 0.92), (4, 0.975)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_hqq_pays(bits: int, gain: float, symmetric: bool) -> None:
    """The fewer the bits, the more: on normal weights in blocks of 128 the roots of errors fall by at least so much."""
    weight, spec = normal(1024, 32), BlockSpec(bits, 128, symmetric)
    nearest, split = (roots_of_errors(weight, quantize_tile(weight, spec, m)).sum() for m in ("rtn", "hqq"))
    assert split <= gain * nearest


@pytest.mark.parametrize("symmetric", [True, False])
def test_hqq_gives_up_outliers_for_the_others(symmetric: bool) -> None:
    weight, spec = heavy_tailed(1024, 32), BlockSpec(3, 128, symmetric)
    nearest, split = (np.abs(weight - dequantize(quantize_tile(weight, spec, m).buffers)) for m in ("rtn", "hqq"))
    assert split.max() > nearest.max()
    assert np.median(split) < 0.9 * np.median(nearest)


def test_hqq_moves_the_error_to_rows_that_matter_less() -> None:
    weight, spec = heavy_tailed(256, 64), BlockSpec(3, 32)
    importance = np.tile([100.0, 1.0], 128).astype(np.float32)
    plain, weighted = quantize_tile(weight, spec, "hqq"), quantize_tile(weight, spec, "hqq", importance)
    important = importance > 1
    assert roots_of_errors(weight, weighted, important).sum() < 0.98 * roots_of_errors(weight, plain, important).sum()


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.80), (3, 0.90), (4, 0.95)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_search_pays(bits: int, gain: float, symmetric: bool) -> None:
    """The fewer the bits, the more: on normal weights in blocks of 128 the error falls by at least so much."""
    weight, spec = normal(1024, 32), BlockSpec(bits, 128, symmetric)
    assert quantize_tile(weight, spec, "search").sq_error <= gain * quantize_tile(weight, spec).sq_error


def test_importance_moves_the_error_to_rows_that_matter_less() -> None:
    weight, spec = heavy_tailed(256, 64), BlockSpec(3, 32)
    importance = np.tile([100.0, 1.0], 128).astype(np.float32)
    plain, weighted = quantize_tile(weight, spec, "search"), quantize_tile(weight, spec, "search", importance)
    important = {id(r): ((weight - dequantize(r.buffers))[::2] ** 2).sum() for r in (plain, weighted)}
    assert important[id(weighted)] < 0.9 * important[id(plain)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_symmetric_uses_the_whole_range(bits: int, sign: int) -> None:
    """The extreme is coded as -2^(bits-1), whatever its sign, and comes back exactly."""
    weight = np.linspace(-0.5, 0.4, 32, dtype=np.float32)[:, None]
    weight[7] = sign * 1.0
    result = quantize_tile(weight, BlockSpec(bits, 32))
    codes, scales, _ = unpack(result.buffers)
    assert codes[7, 0] == 0
    assert np.sign(scales[0, 0]) == -sign
    assert dequantize(result.buffers)[7, 0] == sign


@given(spec=specs, rows=st.integers(1, 100), columns=st.integers(1, 10))
@settings(max_examples=60, deadline=None)
def test_quantizing_again_changes_nothing(spec: BlockSpec, rows: int, columns: int) -> None:
    """A symmetric block contains its extreme code, so the second time finds the same scale and no error."""
    spec = BlockSpec(spec.bits, spec.block, True, spec.scale_dtype)
    first = dequantize(quantize_tile(normal(rows, columns, rows), spec).buffers)
    again = quantize_tile(first, spec)
    if spec.scale_dtype == "float32":
        np.testing.assert_array_equal(dequantize(again.buffers), first)
        assert again.sq_error == 0.0
    assert again.sq_error <= (np.finfo(np.float16).eps * 2**spec.bits) ** 2 * again.sq_weight


@pytest.mark.parametrize("method", get_args(Method))
@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_blocks(method: str, symmetric: bool) -> None:
    weight = normal(96, 5)
    weight[32:64] = 0
    result = quantize_tile(weight, BlockSpec(4, 32, symmetric), method)
    codes, scales, zeros = unpack(result.buffers)
    assert (scales[1] == 0).all()
    assert (codes[32:64] == zeros[1]).all()
    assert (zeros[1] == 8).all()
    assert np.isfinite(dequantize(result.buffers)).all()


def test_asymmetric_keeps_zero_exact() -> None:
    weight = np.abs(normal(64, 8)) + 1
    weight[3] = 0
    assert (dequantize(quantize_tile(weight, BlockSpec(4, 32, False)).buffers)[3] == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", get_args(Method))
def test_nonfinite_weights_are_reported_and_taken_as_zero(dtype: type, value: float, method: Method) -> None:
    weight = normal(70, 40).astype(dtype)
    clean = weight.copy()
    for k, n in ((69, 3), (5, 39), (5, 38)):
        weight[k, n], clean[k, n] = value, 0
    result, expected = quantize_tile(weight, BlockSpec(), method), quantize_tile(clean, BlockSpec(), method)
    assert (result.nonfinite, result.first_nonfinite) == (3, 5 * 40 + 38)
    assert (expected.nonfinite, expected.first_nonfinite) == (0, None)
    np.testing.assert_array_equal(result.codes, expected.codes)
    assert result.sq_error == expected.sq_error


@pytest.mark.parametrize("magnitude", [1e-44, 1e-39, 1e-30, 1e30, 3e38])
def test_any_magnitude_keeps_its_relative_error(magnitude: float) -> None:
    weight = np.clip(normal(64, 16) / 3, -1, 1)
    expected = quantize_tile(weight, BlockSpec()).sq_error / quantize_tile(weight, BlockSpec()).sq_weight
    scaled = (weight * magnitude).astype(np.float32)
    result = quantize_tile(scaled, BlockSpec())
    # 1e-44 is a handful of the smallest denormals: weights and scales are integers of a few units.
    assert result.sq_error / result.sq_weight <= expected * (1.05 if magnitude > 1e-42 else 200)


def test_half_scales_saturate_and_underflow() -> None:
    spec = BlockSpec(4, 32, True, "float16")
    large = quantize_tile(np.full((32, 1), -1e9, np.float32), spec)
    assert large.scales[0, 0] == np.finfo(np.float16).max
    small = quantize_tile(np.full((32, 1), 1e-9, np.float32), spec)
    assert small.scales[0, 0] == 0
    assert (unpack(small.buffers)[0] == 8).all()


@pytest.mark.parametrize("method", ["search", "hqq"])
def test_threads_that_fill_one_buffer(method: Method) -> None:
    weight, spec = normal(256, 512), BlockSpec(4, 32, False)
    whole = quantize_tile(weight, spec, method, layout=Layout.BLOCKED_KN)
    shared = TileBuffers.allocate(spec, Layout.BLOCKED_KN, *weight.shape)

    def work(first: int) -> TileResult:
        tile = weight[:, first : first + 64]
        return quantize_tile(tile, spec, method, layout=Layout.BLOCKED_KN, out=shared, first_column=first)

    with ThreadPoolExecutor(4) as pool:
        tiles = list(pool.map(work, range(0, 512, 64)))
    np.testing.assert_array_equal(shared.codes, whole.codes)
    assert sum(tile.sq_error for tile in tiles) == pytest.approx(whole.sq_error, rel=1e-12)


@pytest.mark.parametrize(
    ("spec", "layout", "rows", "columns", "alignment"),
    [
        (BlockSpec(4, 32), Layout.NBITS, 33, 7, 1),
        (BlockSpec(4, 32), Layout.BLOCKED_KN, 64, 8, 2),
        (BlockSpec(2, 32), Layout.BLOCKED_KN, 64, 8, 4),
        (BlockSpec(4, 32), Layout.BLOCKED_KN, 64, 7, 7),
        (BlockSpec(3, 32), Layout.BLOCKED_KN, 64, 8, 2),
        (BlockSpec(4, 32), Layout.BLOCKED_NK, 33, 7, 2),
        (BlockSpec(4, 32, True), Layout.BLOCKED_NK, 96, 7, 1),
        (BlockSpec(4, 32, False), Layout.BLOCKED_NK, 96, 7, 2),  # three zero points to a column
        (BlockSpec(8, 32, False), Layout.BLOCKED_NK, 33, 7, 1),
    ],
)
def test_column_alignment(spec: BlockSpec, layout: Layout, rows: int, columns: int, alignment: int) -> None:
    assert column_alignment(spec, layout, rows, columns) == alignment


def test_arguments_are_checked() -> None:
    weight, spec = normal(64, 8), BlockSpec()
    for bad, message in (
        (lambda: BlockSpec(bits=5), "bits must be"),
        (lambda: BlockSpec(block=20), "block must be"),
        (lambda: BlockSpec(scale_dtype="float64"), "scale_dtype"),
        (lambda: quantize_tile(weight[0], spec), "a weight must be a matrix"),
        (lambda: quantize_tile(weight[:0], spec), "at least one element"),
        (lambda: quantize_tile(weight, spec, "best"), "method must be"),
        (lambda: quantize_tile(weight, spec, "search", np.ones(3)), "importance must have shape"),
        (lambda: quantize_tile(weight, spec, "search", np.full(64, -1.0)), "finite and not negative"),
        (lambda: quantize_tile(weight, spec, layout="rows"), "rows"),
        (lambda: tile_at(weight, spec, first_column=8), "outside"),
        (lambda: tile_at(weight, BlockSpec(8), first_column=0), "does not fit"),
        (lambda: tile_at(weight[:, :4], spec, first_column=3), "multiples of 2"),
        (lambda: tile_at(weight[:, :3], spec, first_column=0), "multiples of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
    with pytest.raises(TypeError, match="float32, float16 or bfloat16"):
        quantize_tile(weight.astype(np.float64), spec)


def tile_at(tile: Array, spec: BlockSpec, first_column: int) -> TileResult:
    out = TileBuffers.allocate(BlockSpec(), Layout.BLOCKED_KN, 64, 8)
    return quantize_tile(tile, spec, layout=Layout.BLOCKED_KN, out=out, first_column=first_column)


def test_environment_chooses_the_instruction_set(isa: str) -> None:
    code = "from onnxslim_llm.custom_ops import native; print(native.best_isa())"
    # The same package as in this process, and not one that happens to lie in the working directory.
    environment = dict(os.environ, ONNXSLIM_LLM_ISA=isa, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    run = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == isa, run.stderr


def test_describe_names_what_is_in_use(isa: str) -> None:
    assert native.best_isa() in custom_ops.describe()
    assert isa in native.supported_isas()


@pytest.mark.parametrize("method", get_args(Method))
def test_without_the_library_the_reference_gives_the_same(monkeypatch: pytest.MonkeyPatch, method: Method) -> None:
    weight = normal(70, 9)
    here = quantize_tile(weight, BlockSpec(4, 32, False), method)
    monkeypatch.setattr(native, "load", lambda: native.Loaded(None, "not built"))
    assert not custom_ops.available()
    assert custom_ops.describe() == "not built"
    fallback = quantize_tile(weight, BlockSpec(4, 32, False), method)
    np.testing.assert_array_equal(fallback.codes, here.codes)
    assert fallback.sq_error == here.sq_error
