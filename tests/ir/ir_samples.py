"""Models for the tests of the IR, and the comparison that they use."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

#: Every element type that has numbers, with a numpy dtype to draw them from.
NUMERIC_TYPES = {
    TensorProto.FLOAT: np.float32,
    TensorProto.UINT8: np.uint8,
    TensorProto.INT8: np.int8,
    TensorProto.UINT16: np.uint16,
    TensorProto.INT16: np.int16,
    TensorProto.INT32: np.int32,
    TensorProto.INT64: np.int64,
    TensorProto.BOOL: np.bool_,
    TensorProto.FLOAT16: np.float16,
    TensorProto.DOUBLE: np.float64,
    TensorProto.UINT32: np.uint32,
    TensorProto.UINT64: np.uint64,
    TensorProto.COMPLEX64: np.complex64,
    TensorProto.COMPLEX128: np.complex128,
    TensorProto.BFLOAT16: ml_dtypes.bfloat16,
    TensorProto.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn,
    TensorProto.FLOAT8E4M3FNUZ: ml_dtypes.float8_e4m3fnuz,
    TensorProto.FLOAT8E5M2: ml_dtypes.float8_e5m2,
    TensorProto.FLOAT8E5M2FNUZ: ml_dtypes.float8_e5m2fnuz,
    TensorProto.FLOAT8E8M0: ml_dtypes.float8_e8m0fnu,
    TensorProto.UINT4: ml_dtypes.uint4,
    TensorProto.INT4: ml_dtypes.int4,
    TensorProto.FLOAT4E2M1: ml_dtypes.float4_e2m1fn,
    TensorProto.UINT2: ml_dtypes.uint2,
    TensorProto.INT2: ml_dtypes.int2,
}


def same(left: onnx.ModelProto, right: onnx.ModelProto) -> bool:
    """Whether two models are equal, field by field, unknown fields and the presence of empty fields included.

    There is no normalisation: both are serialized the same way, and the bytes are compared.
    """
    return bool(left.SerializeToString(deterministic=True) == right.SerializeToString(deterministic=True))


def text(model: str) -> onnx.ModelProto:
    """Parse a model from ONNX text."""
    return onnx.parser.parse_model(model)


def draw(onnx_type: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Draw an array of an element type; every bit pattern that small types have occurs sooner or later."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(NUMERIC_TYPES[onnx_type])
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(dtype)
    if dtype.name in ("int4", "uint4", "float4_e2m1fn", "int2", "uint2"):
        count = 4 if dtype.name.endswith("2") else 16
        return rng.integers(0, count, shape).astype(np.uint8).view(dtype)
    return rng.integers(0, 256, (*shape, dtype.itemsize)).astype(np.uint8).view(dtype).reshape(shape)


def linear(weights: np.ndarray | TensorProto, name: str = "w") -> onnx.ModelProto:
    """Return a model whose one initializer goes through Identity to the output."""
    tensor = weights if isinstance(weights, TensorProto) else numpy_helper.from_array(weights, name)
    value = helper.make_tensor_value_info("y", tensor.data_type, tensor.dims)
    node = helper.make_node("Identity", [tensor.name], ["y"], name="copy")
    graph = helper.make_graph([node], "g", [], [value], [tensor])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)])


def write_external(model: onnx.ModelProto, folder: Path, data: bytes, entries: dict[str, str], tensor: int = 0) -> Path:
    """Make initializer `tensor` external with these entries, and write model and data (`w.bin`) to a folder."""
    proto = model.graph.initializer[tensor]
    proto.ClearField("raw_data")
    proto.data_location = TensorProto.EXTERNAL
    del proto.external_data[:]
    for key, value in entries.items():
        proto.external_data.add(key=key, value=value)
    (folder / "w.bin").write_bytes(data)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def add_props(target: object, count: int = 1) -> None:
    """Add entries to a metadata_props field."""
    for index in range(count):
        target.add(key=f"key{index}", value=f"value {index} é")  # type: ignore[attr-defined]


def kitchen_sink() -> onnx.ModelProto:
    """Return a model with everything that graphsurgeon loses, and more."""
    f = helper.make_tensor_value_info
    x = f("x", TensorProto.FLOAT, ["batch", 4])
    x.doc_string = "an input"
    x.type.denotation = "TENSOR"
    x.type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    add_props(x.metadata_props, 2)
    w = numpy_helper.from_array(np.arange(16, dtype=np.float32).reshape(4, 4), "w")
    w.doc_string = "a weight"
    add_props(w.metadata_props)
    unused = helper.make_tensor("unused", TensorProto.FLOAT, [2], [1.0, float("nan")])
    overridable = numpy_helper.from_array(np.float32([3]), "overridable")
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.float32([1, 2]), "sparse_w"),
        helper.make_tensor("", TensorProto.INT64, [2], [3, 7]),
        [4, 4],
    )
    then = helper.make_graph(
        [helper.make_node("Add", ["xw", "bias"], ["t0"]), helper.make_node("Mul", ["t0", "w_row"], ["then_out"])],
        "then",
        [],
        [onnx.ValueInfoProto(name="then_out")],
        [numpy_helper.from_array(np.float32([1, 2, 3, 4]), "bias")],
        value_info=[f("t0", TensorProto.FLOAT, ["batch", 4])],
    )
    orelse = helper.make_graph(
        [helper.make_node("Sub", ["xw", "bias"], ["t0"]), helper.make_node("Identity", ["t0"], ["else_out"])],
        "else",
        [],
        [onnx.ValueInfoProto(name="else_out")],
        [numpy_helper.from_array(np.float32([5, 6, 7, 8]), "bias")],
    )
    add_props(then.metadata_props)
    then.doc_string = "taken when true"
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["xw"], name="matmul", doc_string="a product"),
        helper.make_node("Cast", ["overridable"], ["cond"], to=TensorProto.BOOL),
        helper.make_node("If", ["cond"], ["if_out"], name="if", then_branch=then, else_branch=orelse),
        helper.make_node("MatMul", ["if_out", "sparse_w"], ["sp"], name=""),
        helper.make_node("Clip", ["sp", "", "overridable"], ["clipped"], name="no_min"),
        helper.make_node("Twice", ["clipped"], ["twice"], name="call", domain="my.functions", overload="v2", scale=3.0),
        helper.make_node("Weird", ["twice", ""], ["", "strange"], name="custom", domain="com.example"),
        helper.make_node("Constant", [], ["sparse_const"], name="sparse_constant"),
    ]
    add_props(nodes[0].metadata_props, 3)
    device = nodes[0].device_configurations.add(configuration_id="two", pipeline_stage=1)
    device.sharding_spec.add(tensor_name="w", device=[0, 1]).sharded_dim.add(axis=0).simple_sharding.add(num_shards=2)
    nodes[6].attribute.extend(strange_attributes())
    nodes[7].attribute.add(name="sparse_value", type=AttributeProto.SPARSE_TENSOR).sparse_tensor.CopyFrom(sparse)
    y = f("strange", TensorProto.FLOAT, None)
    graph = helper.make_graph(
        nodes,
        "main",
        [x, f("overridable", TensorProto.FLOAT, [1]), f("w_row", TensorProto.FLOAT, [4])],
        [y, f("sparse_const", TensorProto.FLOAT, [4, 4])],
        [w, unused, overridable],
        doc_string="the graph",
        value_info=[
            f("xw", TensorProto.FLOAT, ["batch", 4]),
            f("nobody", TensorProto.INT64, [1]),
            f("w", TensorProto.FLOAT, [4, 4]),
        ],
    )
    graph.sparse_initializer.add().CopyFrom(sparse)
    add_props(graph.value_info[0].metadata_props)
    add_props(graph.metadata_props)
    annotation = graph.quantization_annotation.add(tensor_name="xw")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="overridable")
    graph.quantization_annotation.add(tensor_name="elsewhere")
    model = helper.make_model(
        graph,
        functions=[_function()],
        opset_imports=[
            helper.make_opsetid("", 22),
            helper.make_opsetid("com.example", 7),
            helper.make_opsetid("my.functions", 1),
            helper.make_opsetid("unused.domain", 3),
        ],
        producer_name="tests",
        producer_version="0",
        doc_string="the model",
        domain="org.example",
        model_version=12,
        ir_version=11,
    )
    add_props(model.metadata_props, 2)
    model.configuration.add(name="two", num_devices=2, device=["a", "b"])
    training = model.training_info.add()
    training.algorithm.name = "train"
    training.update_binding.add(key="w", value="w_new")
    return model


def strange_attributes() -> list[AttributeProto]:
    """Return attributes of every type, ordinary ones, odd ones, and those that graphsurgeon drops."""
    tensor = numpy_helper.from_array(np.float32([1, 2]), "named")
    graph = helper.make_graph(
        [helper.make_node("Identity", ["twice"], ["inner"])], "sub", [], [onnx.ValueInfoProto(name="inner")]
    )
    sparse = helper.make_sparse_tensor(tensor, helper.make_tensor("i", TensorProto.INT64, [2], [0, 1]), [2])
    tensor_type = helper.make_tensor_type_proto(TensorProto.FLOAT, ["n"])
    attributes = [
        helper.make_attribute("f", 0.1, doc_string="a float"),
        helper.make_attribute("nan", float("nan")),
        helper.make_attribute("i", -(2**63)),
        helper.make_attribute("s", "text é"),
        helper.make_attribute("bytes", b"\xff\xfe"),
        helper.make_attribute("floats", [1.5, float("inf"), float("nan")]),
        helper.make_attribute("ints", [1, -1, 2**40]),
        helper.make_attribute("strings", ["a", ""]),
        helper.make_attribute("no_floats", [], attr_type=AttributeProto.FLOATS),
        helper.make_attribute("no_ints", [], attr_type=AttributeProto.INTS),
        helper.make_attribute("no_strings", [], attr_type=AttributeProto.STRINGS),
        helper.make_attribute("t", tensor),
        helper.make_attribute("tensors", [tensor, tensor]),
        helper.make_attribute("g", graph),
        helper.make_attribute("sparse", sparse),
        helper.make_attribute("sparses", [sparse, sparse]),
        helper.make_attribute("type", tensor_type),
        helper.make_attribute("types", [tensor_type, tensor_type]),
        AttributeProto(name="i_absent", type=AttributeProto.INT),
        AttributeProto(name="untyped", f=2.5),
        AttributeProto(name="future", type=AttributeProto.FLOAT),
    ]
    attributes[-1].ClearField("type")
    graphs = AttributeProto(name="graphs", type=AttributeProto.GRAPHS)
    graphs.graphs.add().CopyFrom(graph)
    return [*attributes, graphs]


def _function() -> onnx.FunctionProto:
    f = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Constant", [], ["two"], name="const", value_float=2.0),
        helper.make_node("Scale", ["a"], ["b"], domain="com.example"),
        helper.make_node("Mul", ["b", "two"], ["c"], name="mul"),
    ]
    reference = nodes[1].attribute.add(name="scale", type=AttributeProto.FLOAT)
    reference.ref_attr_name = "scale"
    function = helper.make_function(
        "my.functions",
        "Twice",
        ["a"],
        ["c"],
        nodes,
        [helper.make_opsetid("", 21), helper.make_opsetid("com.example", 7)],
        attributes=["mode"],
        attribute_protos=[
            helper.make_attribute("scale", 1.0, doc_string="a default"),
            helper.make_attribute("axes", [1]),
        ],
        doc_string="twice",
        overload="v2",
        value_info=[f("b", TensorProto.FLOAT, ["n"]), f("ghost", TensorProto.FLOAT, [])],
    )
    add_props(function.metadata_props)
    add_props(function.node[2].metadata_props)
    return function
