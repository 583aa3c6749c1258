"""Graphs in ONNX text, and what every cleanup pass must do: same results, no growth, nothing the second time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper, parser

from onnxslim_llm.ir.model import Model, from_proto
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.schema import attribute_default

Array = np.ndarray[Any, Any]

#: Float32 results may differ by reordered operations: a few units in the last place of sums over at most 64 terms.
RTOL, ATOL = 1e-5, 1e-5

#: The smallest fold may cost this many bytes (`FoldConstants.max_growth`), and a moved constant its header.
GROWTH_BYTES = 1024 + 64

#: Sizes that the names in graph inputs take.
SIZES = {"N": 3, "B": 2, "S": 5, "P": 4, "T": 9, "M": 4, "K": 6}


def graph(text: str, opset: int = 17, ir_version: int = 8, **initializers: Array) -> onnx.ModelProto:
    """A model of ONNX text; a header is added unless the text has one."""
    text = text.strip()
    header = "" if text.startswith("<") else f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>\n'
    proto = parser.parse_model(header + text)
    for value in (*proto.graph.input, *proto.graph.output):
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()  # the text of a scalar says nothing about its shape
    for name, array in initializers.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def model_of(proto: onnx.ModelProto) -> Model:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return from_proto(copy)


def feeds(proto: onnx.ModelProto, sizes: Mapping[str, int] = SIZES, seed: int = 0) -> dict[str, Array]:
    """Inputs that fit; integers are small, so that they serve as indices."""
    random = np.random.default_rng(seed)
    found: dict[str, Array] = {}
    given = {initializer.name for initializer in proto.graph.initializer}
    for value in proto.graph.input:
        if value.name in given:
            continue
        tensor = value.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else sizes[d.dim_param] for d in tensor.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if tensor.elem_type == TensorProto.BOOL:
            found[value.name] = np.asarray(random.integers(0, 2, shape)).astype(bool)
        elif np.issubdtype(dtype, np.integer):
            found[value.name] = np.asarray(random.integers(0, 2, shape)).astype(dtype)
        else:
            found[value.name] = np.asarray(random.standard_normal(shape) + 0.5).astype(dtype)
    return found


def run(proto: onnx.ModelProto, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs in ONNX Runtime, without its optimisations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(inputs)), strict=True))


def assert_same_results(before: onnx.ModelProto, after: onnx.ModelProto, inputs: Mapping[str, Array]) -> None:
    expected, actual = run(before, inputs), run(after, inputs)
    assert list(expected) == list(actual)
    for name, value in expected.items():
        assert value.dtype == actual[name].dtype, name
        assert value.shape == actual[name].shape, name
        np.testing.assert_allclose(actual[name], value, rtol=RTOL, atol=ATOL, err_msg=name)


def apply(step: Pass, proto: onnx.ModelProto, sizes: Mapping[str, int] = SIZES) -> tuple[onnx.ModelProto, Change]:
    """Run a pass and check what holds for every cleanup pass; return the new model and the pass's account."""
    model = model_of(proto)
    change = step.apply(model, Context())
    after = model.to_proto()
    # The full check knows no operator that reads a sparse tensor; runtimes do.
    onnx.checker.check_model(after, full_check=not after.graph.sparse_initializer)
    assert [v.SerializeToString() for v in after.graph.input] == [v.SerializeToString() for v in proto.graph.input]
    assert [v.SerializeToString() for v in after.graph.output] == [v.SerializeToString() for v in proto.graph.output]
    assert after.ByteSize() <= proto.ByteSize() + GROWTH_BYTES
    inputs = feeds(proto, sizes)
    assert_same_results(proto, after, inputs)
    again = model_of(after)
    repeated = step.apply(again, Context())
    assert not repeated, f"the second time it changed {repeated.sites}"
    assert again.to_proto().SerializeToString(deterministic=True) == after.SerializeToString(deterministic=True)
    return after, change


def ops(proto: onnx.ModelProto) -> Counter[str]:
    """Number of nodes by operator, subgraphs included."""
    return Counter(node.op_type for node in nodes(proto.graph))


def nodes(proto: onnx.GraphProto) -> list[onnx.NodeProto]:
    inner = [a.g for node in proto.node for a in node.attribute if a.HasField("g")]
    return [*proto.node, *(node for g in inner for node in nodes(g))]


def initializers(proto: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def reasons(change: Change) -> dict[str, str]:
    return {skip.where: skip.reason for skip in change.skipped}


def assert_isomorphic(actual: onnx.ModelProto, expected: onnx.ModelProto) -> None:
    """The same computation, whatever the tensors in between are called."""
    assert ops(actual) == ops(expected)
    opset = next(item.version for item in actual.opset_import if item.domain == "")
    _Comparison(opset).graphs(actual.graph, expected.graph, {})


class _Comparison:
    def __init__(self, opset: int) -> None:
        self.opset = opset

    def graphs(self, left: onnx.GraphProto, right: onnx.GraphProto, outer: Mapping[str, str]) -> None:
        assert [len(left.input), len(left.output)] == [len(right.input), len(right.output)]
        known = {**outer, **{a.name: b.name for a, b in zip(left.input, right.input, strict=True)}}
        made = [{name: n for n in g.node for name in n.output if name} for g in (left, right)]
        held = [{t.name: t for t in g.initializer} for g in (left, right)]

        def same(a: str, b: str) -> None:
            if a in known:
                assert known[a] == b
                return
            known[a] = b
            if a in held[0]:
                one, other = numpy_helper.to_array(held[0][a]), numpy_helper.to_array(held[1][b])
                np.testing.assert_array_equal(one, other, strict=True)
                return
            if not a:
                assert not b
                return
            first, second = made[0][a], made[1][b]
            assert (first.op_type, first.domain) == (second.op_type, second.domain)
            assert list(first.output).index(a) == list(second.output).index(b)
            assert self.attributes(first) == self.attributes(second)
            assert len(first.input) == len(second.input)
            for x, y in zip(first.input, second.input, strict=True):
                same(x, y)
            bodies = [[x.g for x in n.attribute if x.HasField("g")] for n in (first, second)]
            for x, y in zip(*bodies, strict=True):
                self.graphs(x, y, known)

        for a, b in zip(left.output, right.output, strict=True):
            same(a.name, b.name)

    def attributes(self, node: onnx.NodeProto) -> dict[str, Any]:
        values = {a.name: helper.get_attribute_value(a) for a in node.attribute if not a.HasField("g")}
        plain = {k: v.decode() if isinstance(v, bytes) else v for k, v in values.items()}
        return {k: v for k, v in plain.items() if v != attribute_default(node.op_type, node.domain, self.opset, k)}
