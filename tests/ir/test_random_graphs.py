"""Random small models: round trips, copies, and edits that change nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ir_samples import NUMERIC_TYPES, draw, same
from onnx import TensorProto, helper, numpy_helper

from onnxslim_llm.ir.model import from_proto, open_model
from onnxslim_llm.ir.save import SaveOptions, save_model

TYPES = sorted(NUMERIC_TYPES)
NAMES = ["", "n", "same", "é"]


@st.composite
def tensors(pick: st.DrawFn, name: str) -> TensorProto:
    onnx_type = pick(st.sampled_from(TYPES))
    shape = tuple(pick(st.lists(st.sampled_from([0, 1, 2, 3, 40]), max_size=3)))
    array = draw(onnx_type, shape, pick(st.integers(0, 9)))
    tensor = numpy_helper.from_array(array, name)
    if pick(st.booleans()) and onnx_type != TensorProto.FLOAT8E8M0:
        tensor = helper.make_tensor(name, onnx_type, shape, array.flatten())
    if pick(st.booleans()):
        tensor.doc_string = pick(st.sampled_from(NAMES))
    return tensor


@st.composite
def attributes(pick: st.DrawFn, name: str, visible: list[str], depth: int) -> onnx.AttributeProto:
    kinds = ["i", "f", "s", "ints", "floats", "strings", "t"] + (["g"] if depth < 2 else [])
    kind = pick(st.sampled_from(kinds))
    values = {
        "i": st.integers(-(2**63), 2**63 - 1),
        "f": st.floats(width=32, allow_nan=True),
        "s": st.binary(max_size=5),
        "ints": st.lists(st.integers(-5, 5), max_size=3),
        "floats": st.lists(st.floats(width=32), max_size=3),
        "strings": st.lists(st.binary(max_size=3), max_size=3),
    }
    if kind == "t":
        return helper.make_attribute(name, pick(tensors(pick(st.sampled_from(NAMES)))))
    if kind == "g":
        return helper.make_attribute(name, pick(graphs(visible, depth + 1)))
    types = {"i": 2, "f": 1, "s": 3, "ints": 7, "floats": 6, "strings": 8}
    return helper.make_attribute(name, pick(values[kind]), attr_type=types[kind])


@st.composite
def values(pick: st.DrawFn, name: str) -> onnx.ValueInfoProto:
    dims = st.lists(st.one_of(st.none(), st.integers(0, 4), st.sampled_from(["N", "M"])), max_size=3)
    shape = pick(st.one_of(st.none(), dims))
    entry = helper.make_tensor_value_info(name, pick(st.sampled_from(TYPES)), shape)
    return pick(st.sampled_from([entry, onnx.ValueInfoProto(name=name)]))


@st.composite
def graphs(pick: st.DrawFn, visible: list[str], depth: int = 0) -> onnx.GraphProto:
    prefix = f"d{depth}_" if pick(st.booleans()) else ""
    local = [f"{prefix}in{index}" for index in range(pick(st.integers(0, 2)))]
    graph = onnx.GraphProto(name=pick(st.sampled_from(NAMES)))
    graph.input.extend(pick(values(name)) for name in local)
    for index in range(pick(st.integers(0, 3))):
        local.append(f"{prefix}w{index}")
        graph.initializer.append(pick(tensors(local[-1])))
        if pick(st.booleans()) and pick(st.booleans()):
            graph.input.append(pick(values(local[-1])))
    for index in range(pick(st.integers(0, 4))):
        names = st.sampled_from([*local, *visible, ""])
        node = onnx.NodeProto(
            op_type=pick(st.sampled_from(["Add", "Relu", "Thing"])),
            input=pick(st.lists(names, max_size=3)),
            name=pick(st.sampled_from(NAMES)),
        )
        if pick(st.booleans()):
            node.domain = pick(st.sampled_from(["", "d"]))
        for place in range(pick(st.integers(0, 2))):
            node.attribute.append(pick(attributes(f"a{place}", [*local, *visible], depth)))
        outputs = [f"{prefix}t{index}_{place}" for place in range(pick(st.integers(0, 2)))]
        node.output.extend([*outputs, *pick(st.sampled_from([[], [""]]))])
        local += outputs
        graph.node.append(node)
        for name in outputs:
            if pick(st.booleans()):
                graph.value_info.append(pick(values(name)))
    if local:
        graph.output.extend(pick(values(name)) for name in pick(st.lists(st.sampled_from(local), max_size=3)))
    return graph


@st.composite
def models(pick: st.DrawFn) -> onnx.ModelProto:
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("d", 1)]
    return helper.make_model(pick(graphs([])), opset_imports=imports)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(models())
def test_round_trips(proto):
    model = from_proto(proto)
    assert same(model.to_proto(), proto)
    assert same(model.copy().to_proto(), proto)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        path.write_bytes(proto.SerializeToString())
        for external in (False, True):
            save_model(open_model(path), path, SaveOptions(external=external, jobs=2))
            again = open_model(path)
            assert [tensor.values.tobytes() for tensor in again.constants()] == [
                tensor.values.tobytes() for tensor in model.copy().constants()
            ]
            if not external:
                assert same(onnx.load(path), proto)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(models())
def test_looking_at_values_changes_no_content(proto):
    model = from_proto(proto)
    for tensor in model.constants():
        _ = tensor.values
    written = model.to_proto()
    assert [tensor.values.tobytes() for tensor in from_proto(written).constants()] == [
        tensor.values.tobytes() for tensor in model.constants()
    ]
    assert written.graph.node == proto.graph.node or any(
        attribute.HasField("t") or attribute.HasField("g") for node in proto.graph.node for attribute in node.attribute
    )
