"""Ordinary graphsurgeon idioms on an opened model, and what the writer makes of them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from ir_samples import kitchen_sink, linear, same, text
from onnx import AttributeProto, TensorProto, helper, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxslim_llm.errors import CompilerBug, ModelError
from onnxslim_llm.ir.model import Model, from_proto
from onnxslim_llm.ir.ownership import drop_orphans, orphans
from onnxslim_llm.ir.weights import ArrayWeight, ProtoWeight, constant, weight_of

CHAIN = """<ir_version: 10, opset_import: ["" : 21]> g (float[N, 4] x) => (float[N, 4] y)
<float[4] w = {1, 2, 3, 4}> { a = Add (x, w)  b = Mul (a, w)  y = Neg (b) }"""


def chain() -> Model:
    return from_proto(text(CHAIN))


def written(model: Model) -> onnx.ModelProto:
    model.check()
    proto = model.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert same(from_proto(proto).to_proto(), proto), "what was written is stable"
    return proto


def run(proto: onnx.ModelProto, **inputs: np.ndarray) -> list[np.ndarray]:
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(proto).run(None, inputs)  # type: ignore[return-value]


def test_new_node_in_the_middle():
    model = chain()
    graph = model.graph
    scale = gs.Constant("scale", np.float32([10]))
    scaled = gs.Variable("scaled", np.float32, ["N", 4])
    mul = graph.nodes[1]
    graph.nodes.insert(1, gs.Node("Mul", "times10", inputs=[mul.inputs[0], scale], outputs=[scaled]))
    mul.inputs[0] = scaled
    proto = written(model)
    assert [node.op_type for node in proto.graph.node] == ["Add", "Mul", "Mul", "Neg"]
    assert [item.name for item in proto.graph.initializer] == ["w", "scale"]
    assert [item.name for item in proto.graph.value_info] == ["scaled"]
    x = np.ones((1, 4), np.float32)
    w = np.float32([1, 2, 3, 4])
    assert np.array_equal(run(proto, x=x)[0], -((x + w) * 10 * w))


def test_removed_node_and_cleanup():
    model = chain()
    graph = model.graph
    negate = graph.nodes[2]
    graph.outputs = [negate.inputs[0]]
    graph.outputs[0].dtype, graph.outputs[0].shape = np.float32, ("N", 4)
    negate.outputs.clear()
    graph.cleanup().toposort()
    proto = written(model)
    assert [node.op_type for node in proto.graph.node] == ["Add", "Mul"]
    assert [item.name for item in proto.graph.output] == ["b"]


def test_initializers_vanish_with_their_last_user():
    model = chain()
    for node in model.graph.nodes[:2]:
        node.inputs[1] = gs.Constant("v", np.float32([5]))
    assert model.graph.nodes[0].inputs[1] is not model.graph.nodes[1].inputs[1]
    with pytest.raises(CompilerBug, match="two different constants are called 'v'"):
        model.to_proto()
    model.graph.nodes[1].inputs[1] = model.graph.nodes[0].inputs[1]
    assert [item.name for item in written(model).graph.initializer] == ["v"]


def test_changed_values_names_types_and_shapes():
    model = chain()
    graph = model.graph
    weight = graph.nodes[0].inputs[1]
    weight.values = weight.values * 2
    weight.name = "w2"
    graph.nodes[0].name = "first"
    graph.nodes[0].domain = ""
    graph.inputs[0].shape = [2, 4]
    graph.inputs[0].name = "input"
    graph.outputs[0].shape = (2, 4)
    graph.name, graph.producer_name = "renamed", "someone"
    model.set_opset("", 22)
    proto = written(model)
    assert proto.graph.node[0].input == ["input", "w2"]
    assert numpy_helper.to_array(proto.graph.initializer[0]).tolist() == [2, 4, 6, 8]
    assert [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim] == [2, 4]
    assert (proto.graph.name, proto.producer_name, proto.opset_import[0].version) == ("renamed", "someone", 22)


def test_edits_keep_what_they_do_not_touch():
    proto = kitchen_sink()
    model = from_proto(proto)
    matmul = model.graph.nodes[0]
    matmul.name = "renamed"
    matmul.inputs[1].values = np.ones((4, 2), np.float32)
    matmul.outputs[0].shape = ["batch", 2]
    model.graph.inputs[0].shape = [1, 4]
    model.graph.nodes[6].attrs["ints"].append(5)
    model.graph.nodes[6].attrs["f"] = 0.25
    model.graph.nodes[6].attrs["g"].nodes[0].name = "inner"
    result = model.to_proto()
    wanted = kitchen_sink()
    wanted.graph.node[0].name = "renamed"
    tensor = wanted.graph.initializer[0]
    tensor.dims[1] = 2
    tensor.raw_data = np.ones((4, 2), np.float32).tobytes()
    wanted.graph.value_info[2].type.tensor_type.shape.dim[1].dim_value = 2
    wanted.graph.value_info[0].type.tensor_type.shape.dim[1].dim_value = 2
    dim = wanted.graph.input[0].type.tensor_type.shape.dim[0]
    dim.dim_value = 1
    assert dim.denotation == "DATA_BATCH"
    attributes = {attribute.name: attribute for attribute in wanted.graph.node[6].attribute}
    attributes["ints"].ints.append(5)
    attributes["f"].f = 0.25
    attributes["g"].g.node[0].name = "inner"
    assert same(result, wanted)


def test_metadata_of_things_that_are_gone_goes_too():
    model = from_proto(kitchen_sink())
    graph = model.graph
    del graph.nodes[5:7]
    graph.outputs = [graph.outputs[1]]
    graph.cleanup()
    names = {node.name for node in graph.nodes}
    assert names == {"sparse_constant"}
    proto = model.to_proto()
    assert [item.tensor_name for item in proto.graph.quantization_annotation] == ["elsewhere"]
    assert [item.name for item in proto.graph.value_info] == ["nobody"]
    assert [item.name for item in proto.graph.initializer] == ["unused", "overridable"], "a default stays an input"


def test_annotations_follow_renamed_tensors():
    model = from_proto(kitchen_sink())
    model.graph.nodes[0].outputs[0].name = "product"
    for graph in model.graphs():
        for node in graph.nodes:
            assert "xw" not in [tensor.name for tensor in node.inputs], "subgraphs share the outer tensor"
    proto = model.to_proto()
    assert proto.graph.quantization_annotation[0].tensor_name == "product"
    assert proto.graph.value_info[0].name == "product"


def test_orphans_stay_until_they_are_dropped():
    model = from_proto(kitchen_sink())
    assert [tensor.name for tensor in orphans(model.graph)] == ["unused"]
    twin = model.copy()
    assert drop_orphans(model.graph) == ["unused"]
    assert drop_orphans(model.graph) == []
    assert "unused" not in [item.name for item in model.to_proto().graph.initializer]
    assert "unused" in [item.name for item in twin.to_proto().graph.initializer], "copies are independent"


def test_copies_are_independent():
    proto = kitchen_sink()
    model = from_proto(proto)
    twin = model.copy()
    twin.graph.nodes[0].name = "changed"
    twin.graph.nodes[6].attrs["ints"].append(1)
    twin.graph.nodes[6].attrs["t"].values = np.zeros(1)
    twin.graph.nodes[2].attrs["then_branch"].nodes.pop()
    twin.functions[0].nodes[0].name = "changed"
    twin.functions.clear()
    twin.set_opset("com.example", 9)
    twin.graph.inputs[0].shape[0] = 3
    twin.graph.nodes[0].inputs[1].values = np.zeros(3)
    assert same(model.to_proto(), proto)
    assert weight_of(model.copy().graph.nodes[0].inputs[1]) is weight_of(model.graph.nodes[0].inputs[1])
    inner = twin.graph.nodes[2].attrs["else_branch"]
    assert inner.nodes[0].inputs[0] is twin.graph.nodes[0].outputs[0], "captured tensors are the copy's own"


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fnuz])
def test_constants_of_ml_dtypes_arrays(dtype):
    model = chain()
    values = np.arange(7).astype(dtype)
    out = gs.Variable("z", dtype, [7])
    model.graph.nodes.append(gs.Node("Identity", inputs=[gs.Constant("codes", values)], outputs=[out]))
    model.graph.outputs.append(out)
    proto = written(model)
    tensor = proto.graph.initializer[1]
    assert tensor.data_type == helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    assert numpy_helper.to_array(tensor).tobytes() == values.tobytes()
    assert tensor.raw_data == numpy_helper.from_array(values).raw_data


@pytest.mark.parametrize(
    ("value", "kind", "wanted"),
    [
        (1, AttributeProto.INT, 1),
        (True, AttributeProto.INT, 1),
        (np.int32(4), AttributeProto.INT, 4),
        (0.5, AttributeProto.FLOAT, 0.5),
        (np.float16(0.5), AttributeProto.FLOAT, 0.5),
        ("abc", AttributeProto.STRING, b"abc"),
        (b"\xff", AttributeProto.STRING, b"\xff"),
        ([1, 2], AttributeProto.INTS, [1, 2]),
        ((1, np.int64(2)), AttributeProto.INTS, [1, 2]),
        ([1, 2.5], AttributeProto.FLOATS, [1, 2.5]),
        (["a", "b"], AttributeProto.STRINGS, [b"a", b"b"]),
        (np.float16, AttributeProto.INT, TensorProto.FLOAT16),
        (np.dtype(ml_dtypes.int4), AttributeProto.INT, TensorProto.INT4),
    ],
)
def test_attribute_values_of_new_nodes(value, kind, wanted):
    model = chain()
    model.graph.nodes[0].attrs["new"] = value
    attribute = model.to_proto().graph.node[0].attribute[0]
    assert attribute.type == kind
    found = helper.get_attribute_value(attribute)
    assert (list(found) if isinstance(wanted, list) else found) == wanted


def test_attribute_values_that_are_more_than_numbers():
    model = chain()
    body = gs.Graph([], [], [], name="body")
    reference = gs.Node.AttributeRef("outer", float)
    tensor = numpy_helper.from_array(np.float32([1]), "t")
    model.graph.nodes[0].attrs.update(
        array=np.float32([1, 2]),
        constant=gs.Constant("c", np.int64([3])),
        proto=tensor,
        graph=body,
        reference=reference,
    )
    found = {item.name: item for item in model.to_proto().graph.node[0].attribute}
    assert numpy_helper.to_array(found["array"].t).tolist() == [1, 2]
    assert (found["constant"].t.name, numpy_helper.to_array(found["constant"].t).tolist()) == ("c", [3])
    assert found["proto"].t == tensor
    assert found["graph"].g.name == "body"
    assert (found["reference"].ref_attr_name, found["reference"].type) == ("outer", AttributeProto.FLOAT)


def test_empty_lists_get_their_type_from_the_schema():
    model = chain()
    node = gs.Node("Squeeze", attrs={}, inputs=[model.graph.outputs[0]], outputs=[gs.Variable("z", np.float32)])
    pool = gs.Node("MaxPool", attrs={"kernel_shape": [], "storage_order": 0}, inputs=[], outputs=[])
    leaky = gs.Node("LeakyRelu", attrs={"alpha": 1}, inputs=[], outputs=[])
    model.graph.nodes += [node, pool, leaky]
    written_nodes = model.to_proto().graph.node
    assert written_nodes[4].attribute[0].type == AttributeProto.INTS
    assert written_nodes[5].attribute[0].type == AttributeProto.FLOAT, "an integer where the schema wants a float"
    pool.attrs["unheard_of"] = []
    with pytest.raises(ModelError, match=r"'unheard_of' has a value that ONNX cannot hold"):
        model.to_proto()


@pytest.mark.parametrize("value", [{}, [1, "a"], object(), 1j, [[1], [2]]])
def test_attribute_values_that_cannot_be(value):
    model = chain()
    model.graph.nodes[0].attrs["bad"] = value
    with pytest.raises(ModelError, match="'bad' has a value that ONNX cannot hold"):
        model.to_proto()


def test_an_attribute_that_changes_its_type():
    proto = text('<ir_version: 10, opset_import: ["" : 21]> g (float x) => (float y) { y = Cast <to = 1> (x) }')
    proto.graph.node[0].attribute[0].doc_string = "kept"
    model = from_proto(proto)
    model.graph.nodes[0].attrs["to"] = "FLOAT"
    attribute = model.to_proto().graph.node[0].attribute[0]
    assert (attribute.type, attribute.s, attribute.doc_string) == (AttributeProto.STRING, b"FLOAT", "kept")
    assert not attribute.HasField("i")


def test_constants_of_functions_become_nodes():
    model = from_proto(
        text(
            """<ir_version: 10, opset_import: ["" : 21, "d" : 1]> g (float[2] x) => (float[2] y) { y = d.F (x) }
            <domain: "d", opset_import: ["" : 21]> F (a) => (b) { b = Neg (a) }"""
        )
    )
    function = model.functions[0]
    out = gs.Variable("c")
    function.nodes.append(
        gs.Node("Add", inputs=[function.outputs[0], gs.Constant("two", np.float32([2]))], outputs=[out])
    )
    function.outputs = [out]
    proto = written(model)
    assert [node.op_type for node in proto.functions[0].node] == ["Constant", "Neg", "Add"]
    assert np.array_equal(run(proto, x=np.float32([1, 2]))[0], np.float32([1, 0]))


def test_a_new_function_and_its_domain():
    model = chain()
    a, b = gs.Variable("a"), gs.Variable("b")
    function = gs.Function("Twice", "my.ops", [gs.Node("Add", inputs=[a, a], outputs=[b])], [a], [b], opset=21)
    model.functions.append(function)
    out = gs.Variable("z", np.float32, ["N", 4])
    model.graph.nodes.append(gs.Node("Twice", "call", inputs=[model.graph.outputs[0]], outputs=[out], domain="my.ops"))
    model.graph.outputs = [out]
    proto = written(model)
    assert [(item.domain, item.version) for item in proto.opset_import] == [("", 21), ("my.ops", 1)]
    assert [(item.domain, item.version) for item in proto.functions[0].opset_import] == [("", 21)]
    assert run(proto, x=np.zeros((1, 4), np.float32))[0].tolist() == [[-2, -8, -18, -32]]


def test_a_constant_of_the_outer_graph_is_stored_once():
    model = from_proto(
        text(
            """<ir_version: 10, opset_import: ["" : 21]> g (bool c, float[2] x) => (float[2] y)
            { y = If (c) <then_branch = t () => (float[2] a) { a = Neg (x) },
                          else_branch = e () => (float[2] b) { b = Abs (x) }> }"""
        )
    )
    graph = model.graph
    then, other = graph.nodes[0].attrs.values()
    both = gs.Constant("both", np.float32([1, 2]))
    for branch, name in ((then, "t2"), (other, "e2")):
        out = gs.Variable(name, np.float32, [2])
        branch.nodes.append(gs.Node("Add", inputs=[branch.outputs[0], both], outputs=[out]))
        branch.outputs = [out]
    proto = written(model)
    assert [item.name for item in proto.graph.initializer] == []
    branches = [attribute.g for attribute in proto.graph.node[0].attribute]
    assert [[item.name for item in branch.initializer] for branch in branches] == [["both"], ["both"]]
    # As soon as the outer graph uses it too, it is the outer graph's.
    out = gs.Variable("z", np.float32, [2])
    graph.nodes.append(gs.Node("Mul", inputs=[graph.outputs[0], both], outputs=[out]))
    graph.outputs = [out]
    proto = written(model)
    assert [item.name for item in proto.graph.initializer] == ["both"]
    assert all(not attribute.g.initializer for attribute in proto.graph.node[0].attribute)
    assert run(proto, c=np.array(True), x=np.float32([1, 1]))[0].tolist() == [0, 2]


def test_graphsurgeon_can_still_export_our_graph():
    model = chain()
    proto = gs.export_onnx(model.graph)
    x = np.ones((2, 4), np.float32)
    assert np.array_equal(run(proto, x=x)[0], run(model.to_proto(), x=x)[0])


def test_values_that_come_from_elsewhere():
    tensor = numpy_helper.from_array(np.float32([1, 2, 3, 4]), "other")
    for content in (LazyValues(tensor), np.float32([1, 2, 3, 4])):
        model = chain()
        for node in model.graph.nodes[:2]:
            node.inputs[1] = model.graph.nodes[0].inputs[1]
        model.graph.nodes[0].inputs[1].values = content
        proto = written(model)
        assert numpy_helper.to_array(proto.graph.initializer[0]).tolist() == [1, 2, 3, 4]
        assert proto.graph.initializer[0].name == "w"
    assert isinstance(weight_of(constant("c", tensor)), ProtoWeight)
    assert isinstance(weight_of(constant("c", [1.0])), ArrayWeight)
    broken = gs.Constant("c", np.zeros(1))
    broken._values = {"no": "array"}
    with pytest.raises(TypeError, match="'c' holds a dict"):
        weight_of(broken)


def test_sparse_values_of_graphsurgeon():
    proto = linear(np.zeros((2, 2), np.float32), "s")
    del proto.graph.initializer[:]
    values = numpy_helper.from_array(np.float32([5]), "s")
    indices = numpy_helper.from_array(np.array([3], np.int64))
    proto.graph.sparse_initializer.add().CopyFrom(helper.make_sparse_tensor(values, indices, [2, 2]))
    imported = gs.import_onnx(proto)
    assert weight_of(imported.nodes[0].inputs[0]).view().tolist() == [[0, 0], [0, 5]]
    model = Model(imported)
    assert model.to_proto().graph.sparse_initializer[0] == proto.graph.sparse_initializer[0]


def test_a_model_from_scratch():
    x, y = gs.Variable("x", np.float32, ["n"]), gs.Variable("y", np.float32, ["n"])
    model = Model(gs.Graph([gs.Node("Abs", inputs=[x], outputs=[y])], [x], [y], opset=21))
    proto = written(model)
    assert [(item.domain, item.version) for item in proto.opset_import] == [("", 21)]
    assert proto.ir_version == 10
    assert run(proto, x=np.float32([-1]))[0].tolist() == [1]


def test_ir_version_rises_with_what_needs_it():
    model = from_proto(text(CHAIN.replace("ir_version: 10", "ir_version: 7").replace('"" : 21', '"" : 14')))
    assert model.to_proto().ir_version == 7
    model.graph.nodes[0].inputs[1].values = np.ones(4, ml_dtypes.float8_e5m2)
    assert model.to_proto().ir_version == 9
    model.functions.append(gs.Function("F", "d", [], [], [], opset=14))
    model.graph.nodes[0].inputs[1].values = np.ones(4, np.float32)
    assert model.to_proto().ir_version == 8
    model.graph.ir_version = 10
    assert model.to_proto().ir_version == 10


@pytest.mark.parametrize(("after", "listed"), [(3, ["w", "x", "v"]), (4, ["x"])])
def test_initializers_of_old_models_are_all_inputs(after, listed):
    proto = text(CHAIN.replace("ir_version: 10", "ir_version: 3").replace('"" : 21', '"" : 7'))
    proto.graph.input.insert(0, helper.make_tensor_value_info("w", TensorProto.FLOAT, [4]))
    model = from_proto(proto)
    assert same(model.to_proto(), proto)
    assert [tensor.name for tensor in model.graph.inputs] == ["x"]
    model.graph.nodes[1].inputs[1] = gs.Constant("v", np.float32([1, 1, 1, 1]))
    model.graph.ir_version = after
    result = model.to_proto()
    assert [item.name for item in result.graph.input] == listed
    onnx.checker.check_model(result)


def test_fresh_names():
    model = from_proto(kitchen_sink())
    assert [model.fresh_name("new") for _ in range(3)] == ["new", "new_1", "new_2"]
    assert model.fresh_name("bias") == "bias_1", "a name of a subgraph"
    assert model.fresh_name("two") == "two_1", "a name of a function"
    assert model.fresh_name("unused") == "unused_1", "an orphan"
    assert model.fresh_name("nobody") == "nobody_1", "a value_info without a tensor"
    assert model.fresh_name("matmul") == "matmul_1", "a node"
    assert model.fresh_name("w_row") == "w_row_1", "an input that only a subgraph uses"
    assert model.fresh_name("") == "value"
    model.graph.nodes[0].outputs[0].name = "by_hand"
    model.refresh_names()
    assert model.fresh_name("by_hand") == "by_hand_1"
    assert [from_proto(kitchen_sink()).fresh_name("new") for _ in range(2)] == ["new", "new"]


def test_weight_bytes_and_census():
    model = from_proto(kitchen_sink())
    inline = 64 + 8 + 4 + 16 + 16  # w, unused, overridable, two biases
    sparse = 8 + 16
    attributes = 8  # the tensor attribute; the others are kept as protos
    assert model.weight_bytes() == inline + sparse + attributes
    assert model.census() == {
        "MatMul": 2, "Cast": 1, "If": 1, "Clip": 1, "my.functions::Twice": 1, "com.example::Weird": 1, "Constant": 1,
        "Add": 1, "Mul": 1, "Sub": 1, "Identity": 2,
    }  # fmt: skip
    assert model.census(functions=True)["Mul"] == 2
    assert [graph.name for graph in model.graphs()] == ["main", "else", "then", "sub"]


def test_check_sees_broken_edits():
    model = chain()
    model.graph.nodes[1].inputs[0] = gs.Variable("ghost")
    with pytest.raises(ModelError, match="'ghost' is never produced"):
        model.check()
    model = chain()
    model.graph.nodes[0].outputs[0].name = "y"
    with pytest.raises(ModelError, match="'y' is produced more than once"):
        model.check()
    model = chain()
    model.graph.nodes[0].inputs[0] = model.graph.nodes[1].outputs[0]
    with pytest.raises(ModelError, match="a cycle of 2 nodes"):
        model.check()
