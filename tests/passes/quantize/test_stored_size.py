"""`stored_bytes` says what the jobs of each layout write, to the byte."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from onnxslim_llm.concepts.block_weights import WeightScheme
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.passes.lower.weights.pack_job import PackJob
from onnxslim_llm.passes.quantize.bits.stored_size import Storage, storage_of, stored_bytes
from onnxslim_llm.passes.quantize.codes.job import QuantizeJob
from onnxslim_llm.passes.quantize.codes.planes import plane_scheme
from onnxslim_llm.products.sites import WeightGroup
from onnxslim_llm.targets import get_target

#: K that is a multiple of no block, of short ones, and of all; N that fills strips of 16 columns, and that does not.
SHAPES = [(100, 48), (172, 64), (352, 40), (512, 32)]
LAYOUTS = {"tensors": "blocked_kn", "nbits": "nbits", "packed": "nbits"}


def _group(rows: int, columns: int) -> WeightGroup:
    return WeightGroup("W", weight_of(gs.Constant("W", np.zeros((rows, columns), np.float32))), 0)


def _written(group: WeightGroup, scheme: WeightScheme, storage: Storage) -> int:
    job = QuantizeJob(group.source, 0, scheme, "W", LAYOUTS[storage])  # type: ignore[arg-type]
    return sum(spec.nbytes for spec in (PackJob(job) if storage == "packed" else job).outputs)


@pytest.mark.parametrize("storage", LAYOUTS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_bytes_are_those_that_are_written(storage: Storage, rows: int, columns: int) -> None:
    group = _group(rows, columns)
    for bits, block, symmetric in itertools.product((2, 3, 4, 8), (16, 32, 64, 128), (True, False)):
        scheme = WeightScheme(bits, block, symmetric, "search", "float16")
        assert stored_bytes(group, scheme, storage) == _written(group, scheme, storage), scheme


def test_two_planes_take_a_node_more_than_their_bytes() -> None:
    group, scheme = _group(128, 64), WeightScheme(6, 64, True, "search", "float16")
    planes = sum(_written(group, plane_scheme(scheme, i), "packed") for i in (0, 1))
    assert planes < stored_bytes(group, scheme, "packed") < planes + 1000


@pytest.mark.parametrize(
    ("target", "storage"), [("portable", "tensors"), ("ort-cpu", "nbits"), ("ort-cpu-ops", "packed")]
)
def test_targets_store_differently(target: str, storage: Storage) -> None:
    assert storage_of(get_target(target)) == storage
    assert storage_of(None) == "tensors"
