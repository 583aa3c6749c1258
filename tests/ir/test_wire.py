"""Leaving large tensors in the file."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ir_samples import kitchen_sink
from onnx import helper, numpy_helper

from onnxslim_llm.ir.proto.wire import INLINE_BYTES, PLACE, WireError, strip_raw_data

MARK = b"0123456789abcdef"


def strip(message: bytes) -> bytes:
    return strip_raw_data(memoryview(message), MARK)


def test_small_tensors_are_left_alone():
    content = kitchen_sink().SerializeToString()
    assert strip(content) == content


@pytest.mark.parametrize("size", [INLINE_BYTES - 1, INLINE_BYTES, INLINE_BYTES + 1, 1 << 20])
def test_the_threshold(size):
    proto = onnx.ModelProto()
    proto.graph.initializer.add(raw_data=b"r" * size)
    content = proto.SerializeToString()
    stripped = onnx.ModelProto.FromString(strip(content))
    raw = stripped.graph.initializer[0].raw_data
    if size < INLINE_BYTES:
        assert raw == b"r" * size
    else:
        assert raw.startswith(MARK)
        offset, length = PLACE.unpack(raw[len(MARK) :])
        assert content[offset : offset + length] == b"r" * size


def test_all_places_and_no_others():
    big = numpy_helper.from_array(np.arange(3000, dtype=np.float32), "big")
    inner = helper.make_graph([helper.make_node("Constant", [], ["a"], value=big)], "inner", [], [], [big])
    sparse = helper.make_sparse_tensor(big, numpy_helper.from_array(np.arange(3000)), [5000])
    node = helper.make_node("If", ["c"], ["d"], then_branch=inner, tensors=[big], graphs=[inner], sparse=sparse)
    graph = helper.make_graph([node], "g", [], [], [big], sparse_initializer=[sparse])
    function = helper.make_function("d", "F", [], ["a"], [helper.make_node("Constant", [], ["a"], value=big)], [])
    function.attribute_proto.append(helper.make_attribute("t", big))
    model = helper.make_model(graph, functions=[function])
    model.training_info.add().algorithm.CopyFrom(inner)
    stripped = strip(model.SerializeToString())
    # If (Constant, initializer), main graph (initializer, sparse values and indices), function (Constant, default).
    assert stripped.count(MARK) == 7
    # Attributes of lists and of sparse tensors, and the training graph, are kept as protos.
    assert stripped.count(big.raw_data) == 1 + 2 + 1 + 2


@given(st.binary(max_size=300))
def test_anything_is_either_a_message_or_an_error(content):
    try:
        stripped = strip(content)
    except WireError:
        return
    assert stripped == content


@given(st.integers(0, 2**63), st.binary(max_size=20), st.integers(16, 2**29 - 1))
def test_unknown_fields_pass(number, data, field):
    def varint(value: int) -> bytes:
        out = b""
        while value > 127:
            out += bytes([value & 127 | 128])
            value >>= 7
        return out + bytes([value])

    content = varint(field << 3) + varint(number) + varint(field << 3 | 2) + varint(len(data)) + data
    content += varint(field << 3 | 1) + b"12345678" + varint(field << 3 | 5) + b"1234"
    assert strip(content) == content


@pytest.mark.parametrize(
    ("content", "truncated"),
    [
        (b"\x3a\x05abc", True),
        (b"\x08", True),
        (b"\x09abc", True),
        (b"\x0dabc", True),
        (b"\x08" + b"\xff" * 11, False),
        (b"\x0e", False),
    ],
)
def test_broken_messages(content, truncated):
    with pytest.raises(WireError) as caught:
        strip(content)
    assert caught.value.truncated is truncated
