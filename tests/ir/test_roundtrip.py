"""A round trip changes nothing: every field of every kind of model."""

from __future__ import annotations

import time

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from ir_samples import NUMERIC_TYPES, draw, kitchen_sink, linear, same, strange_attributes, text, write_external
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.model import Model, from_proto, open_model
from onnxslim_llm.ir.save import SaveOptions, save_model
from onnxslim_llm.ir.weights import SparseWeight, weight_of

INLINE = SaveOptions(external=False)


def check(proto: onnx.ModelProto, tmp_path) -> Model:
    """Round trip in memory, through a copy, through a stub, and through a file."""
    before = proto.SerializeToString(deterministic=True)
    model = from_proto(proto)
    assert same(model.to_proto(), proto)
    assert same(model.copy().to_proto(), proto)
    stub, weights = model.to_stub()
    assert same(from_proto(stub, weights=weights).to_proto(), proto)
    path, again = tmp_path / "a.onnx", tmp_path / "b.onnx"
    path.write_bytes(before)
    save_model(open_model(path), again, INLINE)
    assert same(onnx.load(again), proto)
    assert proto.SerializeToString(deterministic=True) == before, "the input was changed"
    return model


def test_kitchen_sink(tmp_path):
    model = check(kitchen_sink(), tmp_path)
    assert model.notes == []
    assert model.opset() == 22
    assert model.opset("com.example") == 7
    assert model.opset("nowhere") is None


def test_kitchen_sink_would_fail_through_graphsurgeon_alone():
    proto = kitchen_sink()
    del proto.graph.node[6:]  # it cannot even export these
    assert not same(gs.export_onnx(gs.import_onnx(proto)), proto)


@pytest.mark.parametrize("attribute", strange_attributes(), ids=lambda attribute: attribute.name)
def test_attributes_one_by_one(attribute, tmp_path):
    proto = text(
        '<ir_version: 10, opset_import: ["" : 20, "d" : 1]> g (float[N] twice) => (float y) { y = d.Op (twice) }'
    )
    proto.graph.node[0].attribute.add().CopyFrom(attribute)
    check(proto, tmp_path)


@pytest.mark.parametrize("onnx_type", NUMERIC_TYPES, ids=TensorProto.DataType.Name)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 7)])
def test_tensors_of_all_types_in_both_encodings(onnx_type, shape, tmp_path):
    array = draw(onnx_type, shape)
    flat = array.reshape(-1)
    raw = numpy_helper.from_array(array, "w")
    typed = helper.make_tensor("w", onnx_type, shape, flat.tolist() if flat.dtype.kind == "c" else flat)
    assert raw.HasField("raw_data")
    assert not typed.HasField("raw_data")
    for tensor in (raw, typed):
        model = check(linear(tensor), tmp_path)
        content = weight_of(model.graph.nodes[0].inputs[0])
        assert content.dtype == array.dtype
        assert content.shape == shape
        assert content.nbytes == len(raw.raw_data)
        assert bytes(content.raw()) == raw.raw_data
        assert content.view().tobytes() == array.tobytes()


def test_string_tensors(tmp_path):
    model = check(linear(helper.make_tensor("w", TensorProto.STRING, [2], ["a", "é"])), tmp_path)
    assert list(model.graph.nodes[0].inputs[0].values) == ["a", "é"]


def test_unknown_fields_survive_everywhere(tmp_path):
    # Field 1000, a number (wire type 0), 8 bytes (1), text (2), 4 bytes (5), and a group (3, 4) with a number in it.
    unknown = b"\xc0\x3e\x96\x01\xc1\x3e12345678\xc2\x3e\x03abc\xc5\x3e1234\xc3\x3e\x08\x01\xc4\x3e"
    proto = kitchen_sink()
    node = proto.graph.node[2]
    for message in (
        proto,
        proto.graph,
        proto.graph.node[0],
        proto.graph.node[1].attribute[0],
        proto.graph.initializer[0],
        proto.graph.sparse_initializer[0],
        proto.graph.input[0],
        proto.graph.input[0].type.tensor_type,
        proto.graph.value_info[0],
        proto.graph.output[0],
        proto.graph.quantization_annotation[0],
        proto.functions[0],
        proto.functions[0].node[0],
        proto.functions[0].attribute_proto[0],
        proto.opset_import[0],
        node.attribute[0],
        node.attribute[0].g,
        node.attribute[0].g.node[0],
    ):
        message.MergeFromString(unknown)
    assert proto.SerializeToString().count(b"12345678") == 18
    check(proto, tmp_path)


def test_large_inline_tensors_stay_in_the_file(tmp_path):
    proto = kitchen_sink()
    big = np.arange(5000, dtype=np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(big, "big"))
    proto.graph.initializer.append(helper.make_tensor("typed", TensorProto.FLOAT, [5000], big))
    proto.graph.initializer.append(helper.make_tensor("words", TensorProto.STRING, [1], ["z" * 5000]))
    branch = proto.graph.node[2].attribute[0].g
    branch.initializer.append(numpy_helper.from_array(big + 1, "inner_big"))
    constant = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(big + 2))
    proto.graph.node.append(constant)
    proto.functions[0].node.insert(0, helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(big + 3)))
    proto.graph.node[6].attribute.append(helper.make_attribute("tensors2", [numpy_helper.from_array(big + 4)]))
    check(proto, tmp_path)
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    model = open_model(path)
    kinds = {tensor.name: type(weight_of(tensor)).__name__ for tensor in model.constants()}
    assert kinds["big"] == kinds["inner_big"] == "MappedWeight"
    assert kinds["typed"] == kinds["words"] == "ProtoWeight"
    values = [tensor.values for tensor in model.constants() if tensor.shape == (5000,)]
    assert sorted(float(value[0]) for value in values) == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("name", ["", "named"])
@pytest.mark.parametrize("coordinates", [False, True])
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_sparse_initializers(name, coordinates, raw, dtype, tmp_path):
    flat = np.array([1, 6, 11], np.int64)
    indices = np.stack(np.unravel_index(flat, (3, 4)), axis=1) if coordinates else flat
    values = np.array([1, 2, 3], dtype)
    if raw:
        parts = [numpy_helper.from_array(values, "s"), numpy_helper.from_array(indices, name)]
    else:
        onnx_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        parts = [
            helper.make_tensor("s", onnx_type, [3], values),
            helper.make_tensor(name, TensorProto.INT64, indices.shape, indices.flatten()),
        ]
    proto = linear(np.zeros((3, 4), dtype), "s")
    del proto.graph.initializer[:]
    proto.graph.sparse_initializer.add().CopyFrom(helper.make_sparse_tensor(*parts, [3, 4]))
    model = check(proto, tmp_path)
    weight = weight_of(model.graph.nodes[0].inputs[0])
    assert isinstance(weight, SparseWeight)
    dense = np.zeros(12, dtype)
    dense[flat] = values
    assert np.array_equal(weight.view(), dense.reshape(3, 4))
    model.graph.nodes[0].inputs[0].name = "renamed"
    renamed = model.to_proto()
    assert renamed.graph.sparse_initializer[0].values.name == "renamed"
    assert renamed.graph.node[0].input == ["renamed"]


def test_types_that_are_no_tensors(tmp_path):
    proto = text(
        """<ir_version: 10, opset_import: ["" : 20, "d" : 1]>
        g (seq(float[N]) a, optional(seq(float)) b, map(int64, float) c, sparse_tensor(float[2]) d, float[] e, float f)
          => (seq(float) y, optional(float[2]) z)
          <seq(int64[1]) v> { v = d.Op (a, b, c, d, e, f)  y = d.Op (v)  z = d.Op (v) }"""
    )
    opaque = proto.graph.input.add(name="o")
    opaque.type.opaque_type.name = "thing"
    model = check(proto, tmp_path)
    kinds = {tensor.name: tensor.type for tensor in model.graph.inputs}
    assert kinds["a"] == "sequence_type"
    assert kinds["b"] == "optional_type"
    assert kinds["c"] == "map_type"
    assert kinds["d"] == "sparse_tensor_type"
    assert kinds["o"] == "opaque_type"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("y = Add (x, x)", id="one tensor twice"),
        pytest.param("y = Identity (x)  z = Identity (x)", id="unused output"),
        pytest.param("b = Identity (x)  y = Identity (b)  a = Identity (b)", id="dead end"),
        pytest.param("y = Clip (x, , )", id="trailing empty inputs"),
        pytest.param("y, , w = d.Op (x)", id="empty output in the middle"),
        pytest.param("y = d.Op ()", id="no inputs"),
        pytest.param("= d.Op (x)  y = Identity (x)", id="no outputs"),
    ],
)
def test_odd_graphs(body, tmp_path):
    proto = text(f'<ir_version: 10, opset_import: ["" : 20, "d" : 1]> g (float[N] x) => (float[N] y) {{ {body} }}')
    check(proto, tmp_path)


def test_output_that_is_an_input_or_an_initializer(tmp_path):
    proto = text(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[N] x) => (float[M] x, float[2] w, float[N] y, float[N] y) <float[2] w = {1, 2}> { y = Neg (x) }"""
    )
    check(proto, tmp_path)


def test_empty_graph(tmp_path):
    check(text('<ir_version: 10, opset_import: ["" : 20]> g () => () {}'), tmp_path)


def test_shadowed_and_repeated_names_in_subgraphs(tmp_path):
    # The then branch defines its own "h" and "w" over the outer ones; its first node still sees the outer "h".
    def branch(bias: float, name: str) -> onnx.GraphProto:
        return helper.make_graph(
            [
                helper.make_node("Add", ["h", "w"], ["sum"], name="same"),
                helper.make_node("Neg", ["sum"], ["h"], name="same"),
                helper.make_node("Abs", ["h"], [name], name="same"),
            ],
            "branch",
            [],
            [onnx.ValueInfoProto(name=name)],
            [numpy_helper.from_array(np.float32([bias]), "w")],
        )

    proto = text(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[1] x, bool c) => (float[1] y) <float[1] w = {7}> { h = Add (x, w)  y = If (c) }"""
    )
    proto.graph.node[1].attribute.extend(
        [helper.make_attribute("then_branch", branch(1, "t")), helper.make_attribute("else_branch", branch(2, "e"))]
    )
    model = check(proto, tmp_path)
    then, other = model.graph.nodes[1].attrs.values()
    assert then.nodes[0].inputs[0] is model.graph.nodes[0].outputs[0], "the outer h"
    assert then.nodes[2].inputs[0] is then.nodes[1].outputs[0], "the inner h"
    assert then.nodes[0].inputs[1] is not other.nodes[0].inputs[1]
    assert float(other.nodes[0].inputs[1].values[0]) == 2


def test_loop_and_scan_with_outer_scope(tmp_path):
    proto = text(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (int64 n, bool c, float[4] x) => (float[4] y, float[K, 4] ys, float[4] s)
        <float[4] w = {1, 2, 3, 4}> {
          k = Mul (x, w)
          y, ys = Loop <body = loop (int64 i, bool go, float[4] state) => (bool go_out, float[4] next, float[4] scan) {
            next = Add (state, k)
            scan = Mul (next, w)
            go_out = Identity (go)
          }> (n, c, x)
          s, t = Scan <num_scan_inputs = 1, body = scan (float[4] acc, float[4] row) => (float[4] acc2, float[4] out) {
            acc2 = Add (acc, row)
            out = Sub (acc2, k)
          }> (x, ys)
        }"""
    )
    model = check(proto, tmp_path)
    assert [graph.name for graph in model.graphs()] == ["g", "loop", "scan"]
    assert model.census() == {"Mul": 2, "Loop": 1, "Add": 2, "Identity": 1, "Scan": 1, "Sub": 1}


def test_unsorted_nodes_keep_their_order(tmp_path):
    proto = text('<ir_version: 10, opset_import: ["" : 20]> g (float x) => (float y) { h = Neg (x)  y = Abs (h) }')
    swapped = [proto.graph.node[1], proto.graph.node[0]]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in swapped]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)
    assert "not in topological order" in check(proto, tmp_path).notes[0]


def test_missing_import_of_a_custom_domain_is_added():
    proto = text(
        '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]> g (float x) => (float y) '
        "{ y = com.microsoft.Gelu (x) }"
    )
    del proto.opset_import[1]
    model = from_proto(proto)
    assert model.notes == ["domain 'com.microsoft' was used but not imported; version 1 is assumed"]
    written = model.to_proto()
    assert [(item.domain, item.version) for item in written.opset_import] == [("", 20), ("com.microsoft", 1)]
    del written.opset_import[1]
    assert same(written, proto)


def test_ai_onnx_is_the_same_domain_as_the_empty_one(tmp_path):
    proto = text('<ir_version: 10, opset_import: ["ai.onnx" : 20]> g (float x) => (float y) { y = ai.onnx.Neg (x) }')
    model = check(proto, tmp_path)
    assert model.opset() == 20
    assert model.census() == {"Neg": 1}
    model.set_opset("", 21)
    assert [(item.domain, item.version) for item in model.to_proto().opset_import] == [("ai.onnx", 21)]


def test_external_data_with_and_without_offset(tmp_path):
    values = np.arange(2048, dtype=np.float32)
    for entries, data in (
        ({"location": "w.bin"}, values.tobytes()),
        ({"location": "w.bin", "offset": "12", "length": "8192", "checksum": "x"}, b"x" * 12 + values.tobytes() + b"y"),
    ):
        proto = linear(values)
        path = write_external(proto, tmp_path, data, entries)
        model = open_model(path)
        assert np.array_equal(model.graph.nodes[0].inputs[0].values, values)
        inline = open_model(path).to_proto()
        assert same(inline, linear(values))
        saved = tmp_path / "saved.onnx"
        save_model(open_model(path), saved, SaveOptions(external=True))
        assert same(onnx.load(saved), onnx.load(path)), "external data is loaded inline on both sides"


def test_old_model_without_opset_imports(tmp_path):
    proto = text('<ir_version: 2, opset_import: ["" : 1]> g (float x) => (float y) { y = Neg (x) }')
    del proto.opset_import[:]
    assert check(proto, tmp_path).opset() == 1


def test_attributes_of_old_models_have_no_type(tmp_path):
    proto = text('<ir_version: 1, opset_import: ["" : 1]> g (float x) => (float y) { y = LeakyRelu <alpha = 0.1> (x) }')
    attribute = proto.graph.node[0].attribute[0]
    attribute.ClearField("type")
    model = check(proto, tmp_path)
    assert model.graph.nodes[0].attrs["alpha"] == np.float32(0.1)
    assert attribute.type == AttributeProto.UNDEFINED


def test_a_model_file_of_more_than_2_gib(tmp_path):
    # protobuf cannot parse such files, we can: the tensor stays where it is. The file is sparse and takes no disk.
    from onnxslim_llm.ir.proto.wire import encode_varint

    def field(number: int, length: int) -> bytes:
        return encode_varint(number << 3 | 2) + encode_varint(length)

    count = 3 << 28  # of float32: 3 GiB
    proto = linear(np.zeros(1, np.float32))
    tensor = TensorProto(dims=[count], data_type=TensorProto.FLOAT, name="w").SerializeToString()
    head = tensor + field(9, 4 * count)
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_value = count
    del proto.graph.initializer[:]
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    inner = graph + field(5, len(head) + 4 * count) + head
    start = proto.SerializeToString() + field(7, len(inner) + 4 * count) + inner
    path = tmp_path / "m.onnx"
    with path.open("wb") as file:
        file.write(start)
        file.truncate(len(start) + 4 * count - 4)
        file.seek(0, 2)
        file.write(np.float32(5).tobytes())
    model = open_model(path)
    values = weight_of(model.graph.nodes[0].inputs[0]).view()
    assert values.shape == (count,)
    assert (values[0], values[-1]) == (0, 5)
    assert len(model.to_proto("omit").SerializeToString()) < 1000
    with pytest.raises(ModelError, match="2 GiB"):
        model.to_proto()


def test_reading_and_writing_is_fast():
    nodes = [
        helper.make_node(
            "Conv",
            [f"t{index}", "w"],
            [f"t{index + 1}"],
            name=f"node{index}",
            kernel_shape=[3, 3],
            group=1,
            auto_pad="VALID",
        )
        for index in range(2000)
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("t0", TensorProto.FLOAT, [1, 1, 9, 9])],
        [value("t2000", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones((1, 1, 3, 3), np.float32), "w")],
        value_info=[value(f"t{index}", TensorProto.FLOAT, ["N", 1, 9, 9]) for index in range(1, 2000)],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    took = []
    for _ in range(3):
        begun = time.process_time()
        from_proto(proto).to_proto("omit")
        took.append(time.process_time() - begun)
    assert min(took) < 0.3  # seconds of processor time; 0.15 seen on a busy two-core machine
