"""Packed work gives the numbers of its parts, in every layout, however it is cut into tiles."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from onnxslim_llm.concepts.block_weights import BlockLayout, WeightScheme
from onnxslim_llm.concepts.packed_weights import PackedBlockJob
from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.weights import ArrayWeight
from onnxslim_llm.ir.weights.jobs import derive
from onnxslim_llm.passes.quantize.codes import job as job_module
from onnxslim_llm.passes.quantize.codes.job import QuantizeJob

LAYOUTS: tuple[BlockLayout, ...] = ("blocked_kn", "blocked_nk", "nbits")
ROWS, COLUMNS = 96, (32, 16, 48)


def part(index: int, layout: BlockLayout, k_axis: int = 0, **scheme: object) -> QuantizeJob:
    shape = (ROWS, COLUMNS[index])
    value = np.random.default_rng(index).standard_normal(shape).astype(np.float32)
    stored = value if k_axis == 0 else np.ascontiguousarray(value.T)
    return QuantizeJob(ArrayWeight(stored), k_axis, WeightScheme(**scheme), f"W{index}", layout)  # type: ignore[arg-type]


@pytest.mark.parametrize("k_axis", [0, 1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block"), [(2, 32), (4, 32), (8, 0), (4, 0)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_numbers_are_those_of_the_parts(
    layout: BlockLayout, bits: int, block: int, symmetric: bool, k_axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("TILE_BYTES", "_TILE_BYTES_NUMPY"):  # several tiles a part
        monkeypatch.setattr(job_module, limit, ROWS * 4 * 16)
    jobs = [part(i, layout, k_axis, bits=bits, block=block, symmetric=symmetric) for i in range(3)]
    packed = PackedBlockJob(jobs)
    axis = 1 if layout == "blocked_kn" else 0
    for index, whole in enumerate(derive(packed)):
        alone = [derive(job)[index].view() for job in jobs]
        np.testing.assert_array_equal(whole.view(), np.concatenate(alone, axis))
    assert packed.columns == sum(COLUMNS)


def test_another_layout_is_the_same_work() -> None:
    packed = PackedBlockJob([part(i, "blocked_kn") for i in range(2)])
    again = packed.with_layout("nbits")
    assert again.layout == "nbits"
    assert again.identity == packed.identity
    assert again.key != packed.key
    assert again.with_layout("blocked_kn").key == packed.key


def test_order_matters() -> None:
    first, second = part(0, "nbits"), part(1, "nbits")
    assert PackedBlockJob([first, second]).key != PackedBlockJob([second, first]).key


def test_figures_are_told_for_each_part() -> None:
    jobs = [part(i, "nbits") for i in range(3)]
    packed = PackedBlockJob(jobs)
    packed.compute()
    assert packed.figures is not None
    for job in jobs:
        job.compute()
        assert packed.figures["parts"][job.where()] == job.figures
    assert packed.figures["sq_error"] == pytest.approx(sum(job.figures["sq_error"] for job in jobs if job.figures))
    assert packed.where() == "W0 + W1 + W2"


def test_columns_of_tiles() -> None:
    packed = PackedBlockJob([part(i, "nbits") for i in range(3)])
    ranges = [packed.columns_of(tile) for tile in packed.tiles()]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == packed.columns
    assert all(stop == start for (_, stop), (start, _) in pairwise(ranges))


def test_bad_numbers_name_their_own_weight() -> None:
    bad = QuantizeJob(ArrayWeight(np.full((ROWS, 16), np.nan, np.float32)), 0, WeightScheme(), "bad", "nbits")
    with pytest.raises(ModelError, match="NaN") as caught:
        PackedBlockJob([part(0, "nbits"), bad]).compute()
    assert "bad" in caught.value.where


@pytest.mark.parametrize("other", [{"bits": 8}, {"block": 16}, {"symmetric": False}, {"scale_type": "float16"}])
def test_parts_that_are_coded_differently(other: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="is not coded like"):
        PackedBlockJob([part(0, "nbits"), part(1, "nbits", **other)])


def test_parts_of_odd_width() -> None:
    odd = QuantizeJob(ArrayWeight(np.ones((ROWS, 20), np.float32)), 0, WeightScheme(), "odd", "nbits")
    with pytest.raises(ValueError, match="20 columns"):
        PackedBlockJob([part(0, "nbits"), odd])
