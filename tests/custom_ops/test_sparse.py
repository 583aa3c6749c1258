"""The sparse form of packed weights: both implementations, every instruction set, damaged bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_weights import thin_weight

import onnxslim_llm.custom_ops as custom_ops
from onnxslim_llm.custom_ops import kernels, sparse, sparse_kernels
from onnxslim_llm.custom_ops.matmul_reference import Accuracy, Activation, Epilogue
from onnxslim_llm.custom_ops.packed import HEADER_BYTES, PackedScheme

Array = np.ndarray[Any, Any]

pytestmark = pytest.mark.skipif(not custom_ops.available(), reason=custom_ops.describe())

ISAS = kernels.supported_isas() if custom_ops.available() else ()
UNEVEN = 0.03
"""Of the dense bytes: what nibbles lose that are not shared out evenly. Each half of a chunk's 1024 codes has 512 d of
them, give or take s = sqrt(512 d (1 - d)); the longer one has s / sqrt(pi) more than the mean, at most 6.4 bytes of
576. The table of offsets takes far less."""

schemes = st.builds(
    PackedScheme,
    rows=st.integers(1, 300),
    columns=st.integers(1, 25).map(lambda n: 2 * n),
    bits=st.sampled_from([4, 4, 8]),
    block=st.sampled_from([16, 32, 64, 128, 256]),
    symmetric=st.booleans(),
    paired=st.booleans(),
)


@given(scheme=schemes, density=st.sampled_from([0.0, 0.1, 0.5, 1.0]), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_both_implementations_give_the_same_bytes_and_lose_nothing(
    scheme: PackedScheme, density: float, seed: int
) -> None:
    dense = thin_weight(scheme, density, seed)
    made = sparse.make_sparse(dense)
    np.testing.assert_array_equal(sparse_kernels.make_sparse(dense), made)
    assert sparse.is_sparse(made)
    assert not sparse.is_sparse(dense)
    assert sparse.parse(made).scheme == scheme
    np.testing.assert_array_equal(sparse.expand(made), dense)
    for isa in ISAS:
        np.testing.assert_array_equal(sparse_kernels.expand(made, isa), dense)


@given(
    scheme=schemes,
    density=st.sampled_from([0.1, 0.5]),
    rows=st.sampled_from([1, 2, 3, 4, 5, 16, 33]),
    accuracy=st.sampled_from(list(Accuracy)),
    threads=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_products_have_the_bits_of_the_dense_weight(
    scheme: PackedScheme, density: float, rows: int, accuracy: Accuracy, threads: int
) -> None:
    dense = thin_weight(scheme, density)
    rng = np.random.default_rng(1)
    a = rng.standard_normal((rows, scheme.rows)).astype(np.float32)
    columns = scheme.columns // 2 if scheme.paired else scheme.columns
    after = Epilogue(
        bias=rng.standard_normal(scheme.columns).astype(np.float32),
        activation=Activation.SILU_GATE if scheme.paired else Activation.GELU,
        residual=rng.standard_normal((rows, columns)).astype(np.float32),
    )
    made = sparse_kernels.make_sparse(dense)
    for isa in ISAS:
        for epilogue in (None, after):
            expected = kernels.matmul(a, dense, scheme, accuracy, epilogue, isa, threads)
            found = kernels.matmul(a, made, scheme, accuracy, epilogue, isa, threads)
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("density", [0.5, 0.25, 0.1])
def test_bytes_are_what_the_density_says(bits: int, density: float) -> None:
    scheme = PackedScheme(512, 256, bits=bits)
    dense = thin_weight(scheme, density)
    made = sparse.make_sparse(dense)
    found = sparse.parse(made).density
    assert sparse_kernels.stored_values(made) == sparse.parse(made).values
    assert found == pytest.approx(density, abs=0.01)
    places = scheme.rows * scheme.columns
    stated = dense.size - (1 - found) * places * bits / 8 + places / 8
    assert stated <= made.size <= stated + UNEVEN * dense.size


@pytest.mark.parametrize("bits", [4, 8])
def test_the_break_even(bits: int) -> None:
    scheme = PackedScheme(512, 256, bits=bits, block=256)
    zeros = sparse.break_even(bits)
    for share, smaller in ((zeros + 0.05, True), (zeros - 0.05, False)):
        dense = thin_weight(scheme, 1 - share)
        assert (sparse_kernels.sparse_bytes(dense) < dense.size) is smaller


def test_the_format_is_pinned() -> None:
    dense = thin_weight(PackedScheme(40, 3, symmetric=False), 0.0)
    made = sparse.make_sparse(dense)
    expected = (
        b"oslspar\n" + bytes([1, 0, 64, 0, 4, 1, 1, 0, 40, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0])
        + bytes([32, 0, 0, 0, 64, 0, 0, 0, 208, 0, 0, 0, 16, 0, 0, 0, 32, 1, 0, 0, 0, 0, 0, 0]) + bytes(8)
        + bytes([16, 0, 0, 0, 0, 0, 0, 0, 224, 0, 0, 0, 0, 0, 0, 0]) + bytes(128)  # the table, an empty bitmap
    )  # fmt: skip
    assert made[: len(expected)].tobytes() == expected
    assert made.size == 64 + 16 + 128 + 80 + 64


@pytest.mark.parametrize("bits", [2, 3])
def test_narrow_codes_have_no_sparse_form(bits: int) -> None:
    dense = thin_weight(PackedScheme(64, 16, bits=bits), 0.5)
    with pytest.raises(ValueError, match=f"codes of {bits} bits have no sparse form"):
        sparse.make_sparse(dense)
    with pytest.raises(ValueError, match="not a packed weight of 4 or 8 bits"):
        sparse_kernels.make_sparse(dense)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_bytes_are_refused_by_both_or_by_none(data: st.DataObject) -> None:
    made = sparse.make_sparse(thin_weight(PackedScheme(100, 40), 0.5))
    reach = data.draw(st.sampled_from([HEADER_BYTES, HEADER_BYTES + 32, made.size]))
    for _ in range(data.draw(st.integers(1, 4))):
        made[data.draw(st.integers(0, reach - 1))] ^= np.uint8(1 << data.draw(st.integers(0, 7)))
    made = made[: data.draw(st.sampled_from([made.size, made.size - 1, reach]))]
    try:
        expected: Array | None = sparse.expand(made)
    except ValueError:
        expected = None
    if expected is None:
        with pytest.raises(ValueError):
            sparse_kernels.expand(made)
    else:
        np.testing.assert_array_equal(sparse_kernels.expand(made), expected)
