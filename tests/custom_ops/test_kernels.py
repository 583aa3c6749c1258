"""The products of packed weights: every instruction set against the numpy specification."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import onnxslim_llm.custom_ops as custom_ops
from onnxslim_llm.custom_ops import kernels, packed
from onnxslim_llm.custom_ops import matmul_reference as reference
from onnxslim_llm.custom_ops.matmul_reference import Accuracy, Activation, Epilogue
from onnxslim_llm.custom_ops.packed import PackedScheme

Array = np.ndarray[Any, Any]

pytestmark = pytest.mark.skipif(not custom_ops.available(), reason=custom_ops.describe())

ISAS = kernels.supported_isas() if custom_ops.available() else ()
AMX_ROWS = 11
"""From here on AMX computes in bfloat16 where int8 was allowed."""

EXACT_ERROR = 1e-5
"""Largest error of the exact mode, of the largest result: sums of some thousand float32 products lose about
sqrt(K) * 2^-24 of it, 4e-6 at K = 4096."""
BF16_ERROR = 5e-3
"""Root mean square error of the bfloat16 mode, of the results': both factors are off by up to 2^-9 (uniform, so by
2^-9 / sqrt(3) * sqrt(2) = 1.6e-3 together), and more where mantissas are near 1."""
EPILOGUE_ERROR = 2e-6
"""Of polynomials in float32 instead of float64 functions, of the largest magnitude that goes in."""

schemes = st.builds(
    PackedScheme,
    rows=st.integers(1, 400),
    columns=st.integers(1, 35).map(lambda n: 2 * n),
    bits=st.sampled_from([4, 4, 8, 3, 2]),
    block=st.sampled_from([16, 32, 64, 128, 256]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["float16", "float32", "bfloat16"]),
    paired=st.booleans(),
)


def nbits_arrays(scheme: PackedScheme, rng: np.random.Generator) -> tuple[Array, Array, Array | None]:
    blocks = -(-scheme.rows // scheme.block)
    codes = rng.integers(0, 256, (scheme.columns, blocks, scheme.block * scheme.bits // 8), dtype=np.uint8)
    scales = rng.standard_normal((scheme.columns, blocks)) * 0.01
    scales[rng.random(scales.shape) < 0.1] = 0
    typed = scales.astype(getattr(ml_dtypes, scheme.scale_dtype, scheme.scale_dtype))
    if scheme.symmetric:
        return codes, typed, None
    return codes, typed, rng.integers(0, 256, (scheme.columns, -(-blocks * scheme.bits // 8)), dtype=np.uint8)


def random_weight(scheme: PackedScheme, rng: np.random.Generator) -> Array:
    return kernels.pack(scheme, *nbits_arrays(scheme, rng))


def activations(rows: int, k: int, rng: np.random.Generator) -> Array:
    return rng.standard_normal((rows, k)).astype(np.float32)


@given(scheme=schemes, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_both_packers_give_the_same_bytes_and_lose_nothing(scheme: PackedScheme, seed: int) -> None:
    codes, scales, zeros = nbits_arrays(scheme, np.random.default_rng(seed))
    whole = packed.pack(scheme, codes, scales, zeros)
    np.testing.assert_array_equal(kernels.pack(scheme, codes, scales, zeros), whole)
    assert packed.parse(whole) == scheme
    read_scheme, *from_numpy = packed.unpack(whole)
    from_native = kernels.unpack(whole, read_scheme)
    for a, b in zip(from_numpy, from_native, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.tobytes() == b.tobytes()
    assert from_numpy[1].tobytes() == scales.tobytes()
    # What lies beyond K comes back as zero points; packed again, it is the same.
    np.testing.assert_array_equal(packed.pack(scheme, *from_numpy), whole)
    if scheme.rows % scheme.block == 0:
        assert from_numpy[0].tobytes() == codes.tobytes()


def test_strips_can_be_packed_in_parts() -> None:
    scheme = PackedScheme(100, 70, symmetric=False)
    arrays = nbits_arrays(scheme, np.random.default_rng(0))
    out = np.full(scheme.size, 0xAA, np.uint8)
    for strip in reversed(range(scheme.strips)):
        kernels.pack(scheme, *arrays, strips=(strip, strip + 1), out=out)
    np.testing.assert_array_equal(out, packed.pack(scheme, *arrays))


def test_the_header_is_pinned() -> None:
    scheme = PackedScheme(40, 3, bits=4, block=32, symmetric=False, scale_dtype="float16")
    whole = packed.pack(scheme, *nbits_arrays(scheme, np.random.default_rng(0)))
    expected = (
        b"oslpack\n" + bytes([1, 0, 64, 0, 4, 1, 1, 0, 40, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0])
        + bytes([32, 0, 0, 0, 64, 0, 0, 0, 80, 2, 0, 0, 16, 0, 0, 0, 80, 2, 0, 0, 0, 0, 0, 0]) + bytes(8)
    )  # fmt: skip
    assert whole[:64].tobytes() == expected
    assert whole.size == 64 + 512 + 64 + 16


@pytest.mark.parametrize("offset", [0, 8, 10, 12, 13, 14, 15, 16, 24, 32, 36, 40, 44, 48, 56])
def test_a_changed_header_is_refused_by_both_parsers(offset: int) -> None:
    scheme = PackedScheme(64, 16)
    whole = packed.pack(scheme, *nbits_arrays(scheme, np.random.default_rng(0)))
    whole[offset] ^= 0x20
    if offset >= 56:  # reserved bytes: numpy is strict, the kernels do not look
        with pytest.raises(ValueError):
            packed.parse(whole)
        return
    with pytest.raises(ValueError):
        packed.parse(whole)
    with pytest.raises(ValueError):
        kernels.matmul(np.ones((1, 64), np.float32), whole, scheme)


def test_a_short_weight_is_refused() -> None:
    scheme = PackedScheme(64, 16)
    whole = packed.pack(scheme, *nbits_arrays(scheme, np.random.default_rng(0)))
    for size in (0, 63, 64, whole.size - 1):
        with pytest.raises(ValueError):
            kernels.matmul(np.ones((1, 64), np.float32), whole[:size].copy(), scheme)


@pytest.mark.parametrize("kernel_isa", ISAS)
@given(scheme=schemes, rows=st.integers(1, 16), threads=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
@example(scheme=PackedScheme(1, 2), rows=1, threads=1, seed=0)
@settings(max_examples=40, deadline=None)
def test_int8_products_have_the_bits_of_numpy(
    kernel_isa: str, scheme: PackedScheme, rows: int, threads: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weight, a = random_weight(scheme, rng), activations(rows, scheme.rows, rng)
    if kernel_isa == "amx":
        a = a[: AMX_ROWS - 1]
    actual = kernels.matmul(a, weight, scheme, Accuracy.INT8, isa=kernel_isa, threads=threads)
    assert actual.tobytes() == reference.matmul(a, weight, Accuracy.INT8).tobytes()


@pytest.mark.parametrize("kernel_isa", ISAS)
@pytest.mark.parametrize("rows", [11, 16, 17, 32, 47, 70, 260, 300])
@pytest.mark.parametrize("block", [16, 32, 128])
def test_many_rows(kernel_isa: str, rows: int, block: int) -> None:
    rng = np.random.default_rng(rows)
    scheme = PackedScheme(700, 150, block=block, symmetric=block == 32)
    weight, a = random_weight(scheme, rng), activations(rows, scheme.rows, rng)
    actual = kernels.matmul(a, weight, scheme, Accuracy.INT8, isa=kernel_isa, threads=3)
    if kernel_isa != "amx":
        assert actual.tobytes() == reference.matmul(a, weight, Accuracy.INT8).tobytes()
        return
    exact = reference.matmul(a, weight, Accuracy.EXACT)
    assert np.linalg.norm(actual - exact) <= BF16_ERROR * np.linalg.norm(exact)
    one_thread = kernels.matmul(a, weight, scheme, Accuracy.INT8, isa=kernel_isa)
    assert actual.tobytes() == one_thread.tobytes()


@pytest.mark.parametrize("kernel_isa", ISAS)
@given(scheme=schemes, rows=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_exact_products(kernel_isa: str, scheme: PackedScheme, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight, a = random_weight(scheme, rng), activations(rows, scheme.rows, rng)
    actual = kernels.matmul(a, weight, scheme, Accuracy.EXACT, isa=kernel_isa)
    # Of what the terms could add up to: results may cancel.
    size = np.abs(a).astype(np.float64) @ np.abs(reference.dequantize(weight))
    assert (np.abs(actual - reference.matmul(a, weight, Accuracy.EXACT)) <= EXACT_ERROR * size + 1e-30).all()


@pytest.mark.parametrize("kernel_isa", ISAS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32, 64, 256])
@pytest.mark.parametrize("symmetric", [False, True])
def test_exact_products_of_few_rows(kernel_isa: str, rows: int, bits: int, block: int, symmetric: bool) -> None:
    rng = np.random.default_rng(block + rows)
    scheme = PackedScheme(520, 35, bits=bits, block=block, symmetric=symmetric)
    weight, a = random_weight(scheme, rng), activations(rows, scheme.rows, rng)
    actual = kernels.matmul(a, weight, scheme, Accuracy.EXACT, isa=kernel_isa)
    size = np.abs(a).astype(np.float64) @ np.abs(reference.dequantize(weight))
    assert (np.abs(actual - reference.matmul(a, weight, Accuracy.EXACT)) <= EXACT_ERROR * size).all()


@pytest.mark.parametrize("kernel_isa", ISAS)
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_bf16_products(kernel_isa: str, rows: int) -> None:
    rng = np.random.default_rng(rows)
    scheme = PackedScheme(1000, 90)
    weight, a = random_weight(scheme, rng), activations(rows, scheme.rows, rng)
    exact = reference.matmul(a, weight, Accuracy.EXACT)
    actual = kernels.matmul(a, weight, scheme, Accuracy.BF16, isa=kernel_isa)
    assert np.linalg.norm(actual - exact) <= BF16_ERROR * np.linalg.norm(exact)


@pytest.mark.parametrize("kernel_isa", ISAS)
@pytest.mark.parametrize("accuracy", list(Accuracy))
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_row_and_no_other(
    kernel_isa: str, accuracy: Accuracy, rows: int, value: float
) -> None:
    rng = np.random.default_rng(1)
    scheme = PackedScheme(90, 20, scale_dtype="float32")
    codes, scales, zeros = nbits_arrays(scheme, rng)
    scales[scales == 0] = 1e-3
    weight, a = kernels.pack(scheme, codes, scales, zeros), activations(rows, scheme.rows, rng)
    a[0, 80] = value
    actual = kernels.matmul(a, weight, scheme, accuracy, isa=kernel_isa)
    assert not np.isfinite(actual[0]).any() or accuracy is not Accuracy.INT8
    assert np.isnan(actual[0]).all() or accuracy is not Accuracy.INT8 or (kernel_isa == "amx" and rows >= AMX_ROWS)
    assert np.isfinite(actual[1:]).all()


@pytest.mark.parametrize("kernel_isa", ISAS)
def test_denormal_and_tiny_activations(kernel_isa: str) -> None:
    rng = np.random.default_rng(1)
    scheme = PackedScheme(96, 20)
    weight = random_weight(scheme, rng)
    a = activations(3, scheme.rows, rng)
    a[0] *= np.float32(1e-40)
    a[1, :32] *= np.float32(1e-37)
    a[2, 32:64] = 0
    actual = kernels.matmul(a, weight, scheme, Accuracy.INT8, isa=kernel_isa)
    assert actual.tobytes() == reference.matmul(a, weight, Accuracy.INT8).tobytes()
    assert (actual[0] == 0).all()


@pytest.mark.parametrize("kernel_isa", ISAS)
@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("rows", [1, 19])
def test_epilogues(kernel_isa: str, activation: Activation, rows: int) -> None:
    rng = np.random.default_rng(int(activation))
    scheme = PackedScheme(128, 72, paired=activation >= Activation.SILU_GATE)
    weight, a = random_weight(scheme, rng), activations(rows, scheme.rows, rng)
    columns = 36 if scheme.paired else 72
    epilogue = Epilogue(
        bias=rng.standard_normal(72).astype(np.float32) * 3,
        activation=activation,
        residual=rng.standard_normal((rows, columns)).astype(np.float32),
        low_rank_u=rng.standard_normal((128, 3)).astype(np.float32) / 12,
        low_rank_v=rng.standard_normal((3, 72)).astype(np.float32),
    )
    actual = kernels.matmul(a, weight, scheme, Accuracy.EXACT, epilogue, isa=kernel_isa)
    expected = reference.matmul(a, weight, Accuracy.EXACT, epilogue)
    plain = reference.matmul(a, weight, Accuracy.EXACT, Epilogue(bias=epilogue.bias))
    tolerance = (EXACT_ERROR + EPILOGUE_ERROR) * max(1.0, float(np.abs(plain).max())) ** 2
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kernel_isa", ISAS)
@pytest.mark.parametrize("activation", [Activation.SILU, Activation.GELU, Activation.GELU_TANH])
def test_activations_far_from_zero(kernel_isa: str, activation: Activation) -> None:
    scheme = PackedScheme(16, 16, block=16)
    arrays = nbits_arrays(scheme, np.random.default_rng(0))
    weight = kernels.pack(scheme, arrays[0], np.zeros_like(arrays[1]), None)
    far = np.array([-1e30, -1e4, -90, -20, -5, -1, -1e-3, 0, 1e-3, 1, 5, 20, 90, 1e4, 1e30, 88], np.float32)
    nothing, epilogue = np.zeros((1, 16), np.float32), Epilogue(bias=far, activation=activation)
    actual = kernels.matmul(nothing, weight, scheme, Accuracy.EXACT, epilogue, isa=kernel_isa)[0]
    expected = reference.matmul(nothing, weight, Accuracy.EXACT, epilogue)[0]
    # Left of the bulk gelu's own 1e-7 tails times the argument are all that may be off.
    np.testing.assert_allclose(actual[1:], np.nan_to_num(expected[1:]), rtol=EPILOGUE_ERROR, atol=5 * EPILOGUE_ERROR)


@pytest.mark.parametrize("kernel_isa", ISAS)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("rows", [1, 20])
def test_half_precision_in_and_out(kernel_isa: str, dtype: Any, rows: int) -> None:
    rng = np.random.default_rng(0)
    scheme = PackedScheme(100, 37)
    weight, a = random_weight(scheme, rng), activations(rows, scheme.rows, rng).astype(dtype)
    actual = kernels.matmul(a, weight, scheme, Accuracy.EXACT, isa=kernel_isa)
    assert actual.dtype == dtype
    wide = reference.matmul(a.astype(np.float32), weight, Accuracy.EXACT)
    step = 2.0**-10 if dtype is np.float16 else 2.0**-7  # to the nearest of the type, after EXACT_ERROR
    np.testing.assert_allclose(actual.astype(np.float32), wide, rtol=step, atol=EXACT_ERROR)


@pytest.mark.parametrize("kernel_isa", ISAS)
def test_results_too_large_for_half_become_infinite(kernel_isa: str) -> None:
    scheme = PackedScheme(16, 4, block=16, scale_dtype="float32")
    weight = packed.pack(scheme, np.full((4, 1, 8), 0xFF, np.uint8), np.full((4, 1), 60000, np.float32), None)
    a = np.array([[1.0] + [0.0] * 15, [-1.0] + [0.0] * 15], np.float16)
    actual = kernels.matmul(a, weight, scheme, Accuracy.EXACT, isa=kernel_isa)
    assert (actual[0] == np.inf).all()
    assert (actual[1] == -np.inf).all()


@pytest.mark.parametrize("kernel_isa", ISAS)
def test_rows_of_activations_may_lie_apart(kernel_isa: str) -> None:
    rng = np.random.default_rng(0)
    scheme = PackedScheme(64, 20)
    weight, wide = random_weight(scheme, rng), activations(6, 100, rng)
    apart = wide[::2, 7:71]
    expected = kernels.matmul(np.ascontiguousarray(apart), weight, scheme, isa=kernel_isa)
    assert kernels.matmul(apart, weight, scheme, isa=kernel_isa).tobytes() == expected.tobytes()


def test_arguments_that_do_not_fit_are_refused() -> None:
    scheme = PackedScheme(64, 20)
    weight = random_weight(scheme, np.random.default_rng(0))
    a = np.ones((2, 64), np.float32)
    with pytest.raises(ValueError, match="fit a weight of 64 rows"):
        kernels.matmul(a[:, :63], weight, scheme)
    with pytest.raises(ValueError, match="paired halves"):
        kernels.matmul(a, weight, scheme, epilogue=Epilogue(activation=Activation.SILU_GATE))
    missing = next((isa for isa in kernels.ISAS[1:] if isa not in ISAS), None)
    if missing is not None:
        with pytest.raises(ValueError, match="lacks the instruction set"):
            kernels.matmul(a, weight, scheme, isa=missing)
    assert kernels.matmul(a[:0], weight, scheme).shape == (0, 20)


def test_int8_activations_cost_no_more_accuracy_than_a_scale_per_32_allows() -> None:
    """Rounding to 1 / 127 of a block's largest magnitude is a relative error of about 0.6 % of normal activations."""
    rng = np.random.default_rng(0)
    scheme = PackedScheme(2048, 64)
    weight, a = random_weight(scheme, rng), activations(1, 2048, rng)
    exact = reference.matmul(a, weight, Accuracy.EXACT)
    actual = kernels.matmul(a, weight, scheme, Accuracy.INT8, isa="scalar")
    assert np.linalg.norm(actual - exact) < 0.01 * np.linalg.norm(exact)
