from __future__ import annotations

import numpy as np
import pytest
from block_models import weights
from onnx import TensorProto

from onnxslim_llm.concepts.block_weights import BlockLayout, WeightScheme
from onnxslim_llm.custom_ops.quantize import BlockSpec, Layout, Method, quantize_tile
from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.weights import ArrayWeight, dtypes
from onnxslim_llm.ir.weights.jobs import derive
from onnxslim_llm.passes.quantize.codes import job as job_module
from onnxslim_llm.passes.quantize.codes.job import QuantizeJob

#: Root mean square error of uniform rounding over a range of 8 standard deviations, times the number of steps.
ROUNDING = 8 / 12**0.5

LAYOUTS: tuple[BlockLayout, ...] = ("blocked_kn", "blocked_nk", "nbits")


def make(rows: int, columns: int, layout: BlockLayout, k_axis: int = 0, **scheme: object) -> QuantizeJob:
    value = weights(1, rows, columns)
    stored = value if k_axis == 0 else np.ascontiguousarray(value.T)
    return QuantizeJob(ArrayWeight(stored), k_axis, WeightScheme(**scheme), "W", layout)  # type: ignore[arg-type]


def nearest(job: QuantizeJob) -> np.ndarray:
    """W[K, N] from what the job stores, by the meaning of the layout."""
    codes, scales, *zeros = (weight.view() for weight in derive(job))
    bits, rows, columns = job.scheme.bits, job.rows, job.columns
    if job.layout == "nbits":
        per_byte = 8 // bits
        shifts = np.arange(0, 8, bits)

        def cut(packed: np.ndarray, count: int) -> np.ndarray:
            flat = packed.reshape(columns, -1)
            return (flat[:, :, None] >> shifts & ((1 << bits) - 1)).reshape(columns, -1)[:, :count]

        assert codes.shape[1] * job.stored_block == codes.shape[1] * codes.shape[2] * per_byte
        values = cut(codes, rows).T.astype(np.float32)
        offset = cut(zeros[0], scales.shape[1]).T if zeros else np.full(scales.T.shape, 1 << bits - 1)
        scale = scales.T
    else:
        turn = job.layout == "blocked_nk"
        values, scale = ((a.T if turn else a).astype(np.float32) for a in (codes, scales))
        offset = (zeros[0].T if turn else zeros[0]).astype(np.float32) if zeros else np.zeros(scale.shape)
    spread = np.repeat(np.arange(scale.shape[0]), job.stored_block)[:rows]
    return (values - offset[spread].astype(np.float32)) * scale[spread].astype(np.float32)


@pytest.mark.parametrize("k_axis", [0, 1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "block"), [(128, 24, 32), (70, 33, 16), (77, 19, 0), (300, 20, 0)])
def test_all_layouts_hold_the_same_numbers(
    rows: int, columns: int, block: int, bits: int, symmetric: bool, k_axis: int
) -> None:
    jobs = [make(rows, columns, layout, k_axis, bits=bits, block=block, symmetric=symmetric) for layout in LAYOUTS]
    first, *others = (nearest(job) for job in jobs)
    for other in others:
        np.testing.assert_array_equal(first, other)
    value = weights(1, rows, columns)
    assert np.linalg.norm(first - value) < ROUNDING / 2**bits * np.linalg.norm(value)


@pytest.mark.parametrize("k_axis", [0, 1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "columns", "block"), [(512, 40, 16), (264, 33, 16), (70, 64, 0)])
def test_tiles_do_not_show(
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    columns: int,
    block: int,
    layout: BlockLayout,
    bits: int,
    symmetric: bool,
    k_axis: int,
) -> None:
    job = make(rows, columns, layout, k_axis, bits=bits, block=block, symmetric=symmetric)
    assert len(job.tiles()) == 1
    whole = [bytes(a) for a in job.compute()]
    monkeypatch.setattr(job_module, "TILE_BYTES", 2048)
    monkeypatch.setattr(job_module, "_TILE_BYTES_NUMPY", 2048)  # where nothing is compiled
    pieces = job.tiles()
    can_split = layout != "blocked_kn" or (k_axis == 0 and block) or columns * bits % 8 == 0
    assert (len(pieces) > 1) == bool(can_split)
    assert [bytes(a) for a in job.compute()] == whole


def test_large_weights_are_cut_into_tiles_of_about_32_mb() -> None:
    job = QuantizeJob(_Stub((8192, 32001)), 0, WeightScheme(), "W", "blocked_kn")  # an odd vocabulary
    assert len(job.tiles()) >= 16
    assert max((t.stop - t.start) * 32001 * 2 for t in job.tiles()) <= 32 << 20


class _Stub(ArrayWeight):
    """A float16 weight too large to allocate in a test; nothing reads it."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(np.broadcast_to(np.float16(0), shape))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_element_types_are_those_of_the_standard(bits: int, symmetric: bool) -> None:
    job = make(64, 32, "blocked_kn", bits=bits, symmetric=symmetric)
    names = {2: "INT2", 3: "INT4", 4: "INT4", 8: "INT8"}
    kind = names[bits] if symmetric else "U" + names[bits]
    assert dtypes.dtype_name(job.outputs[0].onnx_dtype) == kind
    assert len(job.outputs) == (2 if symmetric else 3)
    assert job.with_layout("nbits").outputs[0].onnx_dtype == TensorProto.UINT8


def test_the_full_range_of_codes_is_used() -> None:
    codes = derive(make(1024, 64, "blocked_kn"))[0].view().astype(np.int8)
    assert (codes.min(), codes.max()) == (-8, 7)


def test_identity_does_not_depend_on_the_layout() -> None:
    first = make(64, 32, "blocked_kn")
    assert first.identity == first.with_layout("nbits").identity
    assert first.key != first.with_layout("nbits").key
    other = QuantizeJob(first.inputs[0], 0, WeightScheme(bits=8), "W")
    assert first.identity != other.identity


@pytest.mark.parametrize("method", ["rtn", "search", "hqq"])
def test_the_report_of_a_weight(method: Method) -> None:
    job = make(128, 64, "blocked_kn", method=method)
    report = job.finish([job.run(tile).stats for tile in job.tiles()])
    expected = quantize_tile(weights(1, 128, 64), BlockSpec(), method, None, Layout.BLOCKED_KN)
    assert report["sq_error"] == expected.sq_error
    assert report["relative_error"] == pytest.approx((expected.sq_error / expected.sq_weight) ** 0.5)
    assert (report["bits"], report["block"]) == (4, 32)


@pytest.mark.parametrize("k_axis", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_bad_value_is_found_across_tiles(
    monkeypatch: pytest.MonkeyPatch, layout: BlockLayout, k_axis: int
) -> None:
    monkeypatch.setattr(job_module, "TILE_BYTES", 2048)
    value = weights(1, 256, 64)
    value[200, 50] = np.nan
    value[100, 60] = np.inf
    stored = value if k_axis == 0 else np.ascontiguousarray(value.T)
    job = QuantizeJob(ArrayWeight(stored), k_axis, WeightScheme(block=16), "W", layout)
    with pytest.raises(ModelError) as caught:
        job.compute()
    where = [100, 60] if k_axis == 0 else [50, 200]  # the first one as the file is read
    assert caught.value.what == f"the weight has 2 NaN or infinite values, the first at {where}"
