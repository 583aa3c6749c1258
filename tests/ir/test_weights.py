"""Weights: types, views, identity, and where their memory is."""

from __future__ import annotations

import mmap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ir_jobs import HalveJob
from ir_samples import NUMERIC_TYPES, draw
from onnx import TensorProto, helper, numpy_helper

from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.weights import (
    AliasWeight,
    ArrayWeight,
    MappedFile,
    MappedWeight,
    ProtoWeight,
    ViewWeight,
    Weight,
    constant,
    dtypes,
    weight_of,
)
from onnxslim_llm.ir.weights.jobs import TensorSpec, derive

SIX_BITS = {TensorProto.FLOAT6E2M3: ml_dtypes.float6_e2m3fn, TensorProto.FLOAT6E3M2: ml_dtypes.float6_e3m2fn}


def mapped(tmp_path: Path, array: np.ndarray, offset: int = 0, name: str = "w.bin") -> MappedWeight:
    onnx_type = dtypes.onnx_dtype(array.dtype)
    path = tmp_path / name
    path.write_bytes(b"x" * offset + dtypes.pack(array, onnx_type).tobytes() + b"tail")
    return MappedWeight(MappedFile(path), offset, array.shape, onnx_type)


# --- packing ---


@given(
    st.sampled_from(sorted(NUMERIC_TYPES) + sorted(SIX_BITS)),
    st.lists(st.integers(0, 5), max_size=4),
    st.integers(0, 2**32),
)
def test_packing_agrees_with_onnx_and_comes_back(onnx_type, shape, seed):
    shape = tuple(shape)
    if onnx_type in SIX_BITS:
        codes = np.random.default_rng(seed).integers(0, 64, shape).astype(np.uint8)
        array = np.asarray(codes).view(SIX_BITS[onnx_type])
    else:
        array = draw(onnx_type, shape, seed)
    wanted = numpy_helper.from_array(array)
    packed = dtypes.pack(array, onnx_type)
    assert packed.tobytes() == wanted.raw_data
    assert len(wanted.raw_data) == dtypes.packed_nbytes(shape, onnx_type) == TensorSpec(shape, onnx_type).nbytes
    back = dtypes.unpack(packed, shape, onnx_type)
    assert back.dtype == array.dtype
    assert back.shape == shape
    assert back.tobytes() == array.tobytes()
    assert dtypes.onnx_dtype(array.dtype) == onnx_type == wanted.data_type


def test_signed_codes_with_high_bits_set_pack_alike():
    # ml_dtypes ignores the upper bits of a byte that holds an int4, and so must packing.
    clean = np.array([0x0F, 0x08, 0x01], np.uint8).view(ml_dtypes.int4)
    dirty = np.array([0xFF, 0xF8, 0x01], np.uint8).view(ml_dtypes.int4)
    assert dtypes.pack(clean, TensorProto.INT4).tobytes() == dtypes.pack(dirty, TensorProto.INT4).tobytes()


def test_other_byte_orders_and_strides():
    array = np.arange(12, dtype=">f4").reshape(3, 4)
    assert ArrayWeight(array).onnx_dtype == TensorProto.FLOAT
    assert bytes(ArrayWeight(array.T).raw()) == np.ascontiguousarray(array.T).astype("<f4").tobytes()


def test_types_that_onnx_does_not_have():
    for dtype in (np.longdouble, "datetime64[s]", np.void):
        with pytest.raises(TypeError, match="no element type"):
            dtypes.onnx_dtype(dtype)
    assert dtypes.numpy_dtype(123) is None
    assert dtypes.dtype_name(123) == "type 123"
    assert dtypes.dtype_name(TensorProto.INT4) == "INT4"
    assert dtypes.onnx_dtype(np.str_) == dtypes.onnx_dtype(object) == TensorProto.STRING
    with pytest.raises(TypeError, match="no fixed size"):
        dtypes.bits_of(TensorProto.STRING)


# --- kinds ---


@pytest.mark.parametrize("onnx_type", NUMERIC_TYPES, ids=TensorProto.DataType.Name)
def test_all_kinds_agree(onnx_type, tmp_path):
    array = draw(onnx_type, (6, 5))
    kinds: list[Weight] = [
        ArrayWeight(array),
        ProtoWeight(numpy_helper.from_array(array, "w")),
        ProtoWeight(typed(onnx_type, array)),
        mapped(tmp_path, array, 3),
        ViewWeight.reshape(mapped(tmp_path, array, name="v.bin"), (6, 5)),
        ViewWeight.transpose(ArrayWeight(np.ascontiguousarray(array.T))),
        AliasWeight(AliasWeight(ArrayWeight(array), (kinds_nbytes(array),), TensorProto.UINT8), (6, 5), onnx_type),
    ]
    raw = numpy_helper.from_array(array).raw_data
    for weight in kinds:
        assert weight.shape == (6, 5)
        assert weight.size == 30
        assert weight.dtype == array.dtype
        assert weight.nbytes == len(raw)
        assert bytes(weight.raw()) == raw
        assert b"".join(bytes(piece) for _, piece in weight.chunks(7)) == raw
        assert weight.view().tobytes() == array.tobytes()
        assert weight.view().dtype == array.dtype
        assert not weight.view().flags.writeable
        assert numpy_helper.to_array(weight.tensor).tobytes() == array.tobytes()
        weight.release()
        weight.release(1, 3)
        assert weight.view().tobytes() == array.tobytes()
    assert len({weight.digest() for weight in kinds}) == 1


def typed(onnx_type: int, array: np.ndarray) -> TensorProto:
    """The array in int32_data, float_data, ..."""
    if onnx_type == TensorProto.FLOAT8E8M0:  # helper.make_tensor rounds its subnormal scales
        return TensorProto(name="w", data_type=onnx_type, dims=array.shape, int32_data=array.flatten().view(np.uint8))
    return helper.make_tensor("w", onnx_type, array.shape, array.flatten())


def kinds_nbytes(array: np.ndarray) -> int:
    return dtypes.packed_nbytes(array.shape, dtypes.onnx_dtype(array.dtype))


def test_digest_tells_type_shape_and_content_apart():
    array = np.arange(6, dtype=np.float32)
    others = [
        array,
        array.reshape(2, 3),
        array.reshape(3, 2),
        array.view(np.int32),
        array + 1,
        np.array(["a", ""]),
        np.array(["", "a"]),
    ]
    assert len({ArrayWeight(item).digest() for item in others}) == len(others)
    proto = ProtoWeight(helper.make_tensor("s", TensorProto.STRING, [2], ["a", ""]))
    assert proto.digest() == ArrayWeight(np.array(["a", ""])).digest()


def test_strings():
    weight = ArrayWeight(np.array(["é", "bc"], object))
    assert weight.nbytes == 4
    assert list(weight.tensor.string_data) == ["é".encode(), b"bc"]
    with pytest.raises(ModelError, match="no raw bytes"):
        weight.raw()


def test_views_cost_nothing(tmp_path):
    base = mapped(tmp_path, np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024))
    transposed = ViewWeight.transpose(base)
    window = ViewWeight.reshape(base, (2, 512, 1024))
    assert transposed.view().base is not None
    assert np.shares_memory(transposed.view(), base.view())
    assert np.shares_memory(window.view(), base.view())
    assert not transposed.view().flags.owndata
    assert transposed.view()[3, 5] == base.view()[5, 3]


def test_views_of_views_and_wrong_views():
    base = ArrayWeight(np.arange(24).reshape(2, 3, 4))
    twice = ViewWeight.transpose(ViewWeight.transpose(base, (1, 2, 0)), (2, 0, 1))
    assert np.array_equal(twice.view(), base.view())
    with pytest.raises(ValueError, match="does not permute"):
        ViewWeight.transpose(base, (0, 1))
    with pytest.raises(ValueError, match="cannot be reshaped"):
        ViewWeight.reshape(base, (5,))
    with pytest.raises(ValueError, match="unknown view"):
        ViewWeight(base, ("flip", (0,)))
    with pytest.raises(ValueError, match="needs 48"):
        AliasWeight(base, (24,), TensorProto.INT16)


@pytest.mark.parametrize("shape", [(50, 40), (3, 50, 7), (1, 1), (0, 5), (2000,)])
@pytest.mark.parametrize("limit", [1, 100, 5000, 1 << 20])
def test_transposed_chunks(shape, limit, tmp_path):
    base = mapped(tmp_path, np.arange(np.prod(shape), dtype=np.int32).reshape(shape))
    for permutation in (tuple(reversed(range(len(shape)))), tuple(np.roll(range(len(shape)), 1))):
        weight = ViewWeight.transpose(base, permutation)
        pieces = list(weight.chunks(limit))
        starts = [start for start, _ in pieces]
        lengths = [memoryview(piece).nbytes for _, piece in pieces]
        assert starts == [sum(lengths[:index]) for index in range(len(lengths))]
        content = b"".join(bytes(piece) for _, piece in pieces)
        assert content == np.ascontiguousarray(base.view().transpose(permutation)).tobytes()


def test_keys(tmp_path):
    array = np.arange(64, dtype=np.uint8).reshape(8, 8)
    weight = mapped(tmp_path, array)
    same = MappedWeight(MappedFile(weight.file.path), 0, (8, 8), TensorProto.UINT8)
    assert weight.key == same.key
    assert weight.key != MappedWeight(weight.file, 1, (8, 7), TensorProto.UINT8).key
    reshaped, alias = ViewWeight.reshape(weight, (64,)), AliasWeight(weight, (128,), TensorProto.INT4)
    assert weight.storage_key == reshaped.storage_key == alias.storage_key
    assert len({weight.key, reshaped.key, alias.key}) == 3
    assert alias.storage is reshaped.storage is weight
    assert ViewWeight.transpose(weight).key == ViewWeight.transpose(same).key != weight.key
    assert ArrayWeight(array).key == ArrayWeight(array).key != ArrayWeight(array.copy()).key
    source = ArrayWeight(array.astype(np.float32))
    first, second = derive(HalveJob(source)), derive(HalveJob(source))
    assert first[0].key == second[0].key != first[1].key
    weight.file.path.write_bytes(bytes(100))
    assert MappedWeight(MappedFile(weight.file.path), 0, (8, 8), TensorProto.UINT8).key != weight.key


def test_derived_weights_can_be_read_before_they_are_saved():
    array = np.random.default_rng(0).standard_normal((300, 20)).astype(np.float32)
    job = HalveJob(ArrayWeight(array))
    half, sums, seven = derive(job)
    assert np.array_equal(half.view(), array.astype(np.float16))
    assert np.array_equal(sums.load(), array.sum(axis=1, dtype=np.float32))
    assert seven.view().tolist() == [7]
    assert job.runs == len(job.tiles()), "one run serves all outputs"
    assert half.digest() == derive(HalveJob(ArrayWeight(array.copy())))[0].digest()
    assert half.digest() != sums.digest()
    array[0, 0] = np.inf
    with pytest.raises(ModelError, match="1 weights are no finite numbers"):
        derive(HalveJob(ArrayWeight(array)))[0].view()


def test_jobs_on_jobs():
    array = np.arange(12, dtype=np.float32).reshape(4, 3)

    class Back(HalveJob):
        def run(self, tile):
            output = super().run(tile)
            output.writes[0] = (0, output.writes[0][1], np.asarray(output.writes[0][2]) + np.float16(1))
            return output

    inner = derive(HalveJob(ArrayWeight(array)))[0]
    assert derive(Back(inner))[0].view().tolist() == (array + 1).tolist()


def test_weight_of_does_not_load(tmp_path):
    weight = mapped(tmp_path, np.arange(4, dtype=np.float32))
    tensor = constant("c", weight)
    assert weight_of(tensor) is weight
    assert tensor.shape == (4,)
    assert tensor.dtype == np.float32
    assert tensor._values is weight
    array = tensor.values
    assert isinstance(array, np.ndarray)
    array[0] = 9  # what graphsurgeon hands out may be changed
    again = weight_of(tensor)
    assert isinstance(again, ArrayWeight)
    assert again.array is array
    assert weight.view()[0] == 0


# --- memory ---


def resident(path: Path) -> int:
    """Bytes of a file that are mapped into this process and resident."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_release_drops_pages(tmp_path):
    size = 1 << 22
    (tmp_path / "w.bin").write_bytes(bytes(size))
    weight = MappedWeight(MappedFile(tmp_path / "w.bin"), 100, (size - 200,), TensorProto.UINT8)
    assert resident(tmp_path / "w.bin") == 0
    view = weight.view()
    assert resident(tmp_path / "w.bin") == 0
    assert view.sum() == 0
    assert resident(tmp_path / "w.bin") >= size
    weight.release(0, size // 2)
    assert resident(tmp_path / "w.bin") <= size // 2 + mmap.PAGESIZE
    weight.release()
    assert resident(tmp_path / "w.bin") == 0
    assert view.sum() == 0, "still readable"
    ViewWeight.transpose(ViewWeight.reshape(weight, (2, size // 2 - 100))).view().sum()
    weight.digest()
    assert resident(tmp_path / "w.bin") <= 8 << 20


def test_protos_are_not_copied_for_everybody():
    weight = ProtoWeight(numpy_helper.from_array(np.zeros(1000, np.float32)))
    first = weight.view()
    assert weight.view() is first
