"""Weights side by side: content, pieces, identity, and the data file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto

from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.save import SaveOptions, save_model
from onnxslim_llm.ir.save.layout import work_identity
from onnxslim_llm.ir.weights import (
    ArrayWeight,
    ConcatWeight,
    MappedFile,
    MappedWeight,
    ProtoWeight,
    ViewWeight,
    Weight,
    constant,
)


def arrays(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    return [np.random.default_rng(i).standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)]


def pieces(weight: Weight, limit: int) -> bytes:
    found = list(weight.chunks(limit))
    assert [start for start, _ in found] == list(np.cumsum([0, *(len(memoryview(d)) for _, d in found)])[:-1])
    return b"".join(bytes(data) for _, data in found)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("limit", [16, 100, 1 << 20])
def test_content_and_pieces(axis: int, limit: int) -> None:
    parts = arrays((6, 4), (6, 10)) if axis else arrays((4, 6), (10, 6))
    weight = ConcatWeight([ArrayWeight(part) for part in parts], axis)
    wanted = np.concatenate(parts, axis)
    assert weight.shape == wanted.shape
    np.testing.assert_array_equal(weight.view(), wanted)
    assert bytes(weight.raw()) == wanted.tobytes()
    assert pieces(weight, limit) == wanted.tobytes()
    assert weight.digest() == ArrayWeight(wanted).digest()


def test_transposed_parts_are_transposed_together() -> None:
    """Rows of transposed parts lie all over their files; rows of their bases do not."""
    parts = arrays((4, 6), (10, 6))
    weight = ConcatWeight.concatenate([ViewWeight.transpose(ArrayWeight(part)) for part in parts], 1)
    assert isinstance(weight, ViewWeight)
    assert isinstance(weight.base, ConcatWeight)
    assert weight.base.axis == 0
    np.testing.assert_array_equal(weight.view(), np.concatenate(parts, 0).T)


def test_a_transposed_and_a_plain_part() -> None:
    first, second = arrays((4, 6), (6, 10))
    weight = ConcatWeight.concatenate([ViewWeight.transpose(ArrayWeight(first)), ArrayWeight(second)], 1)
    wanted = np.concatenate([first.T, second], 1)
    np.testing.assert_array_equal(weight.view(), wanted)
    assert pieces(weight, 64) == wanted.tobytes()


def test_identity_follows_the_parts() -> None:
    one, two = (ArrayWeight(part) for part in arrays((6, 4), (6, 4)))
    keys = {ConcatWeight(parts, axis).key for parts in ([one, two], [two, one]) for axis in (0, 1)}
    assert len(keys) == 4
    assert ConcatWeight([one, two], 1).key == ConcatWeight([one, two], 1).key


def test_work_on_mapped_parts_is_known_without_reading(tmp_path: Path) -> None:
    (part,) = arrays((6, 4))
    (tmp_path / "w.bin").write_bytes(part.tobytes())
    mapped = MappedWeight(MappedFile(tmp_path / "w.bin"), 0, part.shape, TensorProto.FLOAT)
    text = work_identity(ConcatWeight([mapped, mapped], 1))
    assert text.count("w.bin") == 2
    assert text != work_identity(ConcatWeight([mapped, mapped], 0))


@pytest.mark.parametrize(
    ("shapes", "axis"), [(((6, 4), (5, 4)), 1), (((6, 4), (6,)), 0), (((6, 4), (6, 4)), 2)], ids=str
)
def test_parts_that_do_not_fit(shapes: tuple[tuple[int, ...], ...], axis: int) -> None:
    with pytest.raises(ValueError, match="cannot be concatenated"):
        ConcatWeight([ArrayWeight(part) for part in arrays(*shapes)], axis)


def test_types_that_do_not_fit() -> None:
    (one,) = arrays((6, 4))
    with pytest.raises(ValueError, match="cannot be concatenated"):
        ConcatWeight([ArrayWeight(one), ArrayWeight(one.astype(np.float16))], 1)
    packed = ProtoWeight(onnx.TensorProto(dims=(2, 2), data_type=TensorProto.INT4, raw_data=b"ab"))
    with pytest.raises(ValueError, match="below a byte"):
        ConcatWeight([packed, packed], 1)


def test_saved_bytes(tmp_path: Path) -> None:
    parts = arrays((64, 40), (64, 24))
    weight = ConcatWeight([ArrayWeight(part) for part in parts], 1)
    graph = gs.Graph(opset=17)
    x, y = gs.Variable("x", np.float32, ("n", 64)), gs.Variable("y", np.float32, ("n", 64))
    graph.nodes.append(gs.Node("MatMul", "product", {}, [x, constant("W", weight)], [y]))
    graph.inputs, graph.outputs = [x], [y]
    save_model(Model(graph), tmp_path / "m.onnx", SaveOptions(external=True))
    (stored,) = onnx.load(tmp_path / "m.onnx").graph.initializer
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(stored), np.concatenate(parts, 1))
