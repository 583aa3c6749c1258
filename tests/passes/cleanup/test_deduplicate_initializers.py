from __future__ import annotations

import numpy as np
import onnx
import pytest
from cleanup_graphs import apply, graph, initializers, reasons

from onnxslim_llm.passes.cleanup.deduplicate_initializers import DeduplicateInitializers

TEXT = "g (float[N, 3] x) => (float[N, 3] y) { s = Add (x, a)  y = Mul (s, b) }"
A = np.array([1.0, 2.0, 3.0], np.float32)


def test_equal_ones_become_the_first() -> None:
    after, change = apply(DeduplicateInitializers(), graph(TEXT, a=A, b=A.copy()))
    assert list(initializers(after)) == ["a"]
    assert (change.sites, change.detail) == (["b"], {"bytes": 12})


@pytest.mark.parametrize(
    "other",
    [A + np.float32(1e-6) * A, A.reshape(1, 3), np.array([1.0, 2.0, np.nan], np.float32)],
    ids=["value", "shape", "nan"],
)
def test_different_ones_stay(other: np.ndarray) -> None:
    _, change = apply(DeduplicateInitializers(), graph(TEXT, a=A, b=other))
    assert not change


def test_bits_count_not_values() -> None:
    zeros = np.zeros(3, np.float32)
    _, change = apply(DeduplicateInitializers(), graph(TEXT, a=zeros, b=-zeros))
    assert not change  # 1 / 0.0 is not 1 / -0.0
    nan = np.array([np.nan, 1, 2], np.float32)
    _, change = apply(DeduplicateInitializers(), graph(TEXT, a=nan, b=nan.copy()))
    assert change


def test_one_element_in_the_middle_of_a_large_one() -> None:
    text = "g (float[N, 3000] x) => (float[N, 3000] y) { s = Add (x, a)  y = Mul (s, b) }"
    a = np.arange(3000, dtype=np.float32)
    b = a.copy()
    b[1501] += 1
    _, change = apply(DeduplicateInitializers(), graph(text, a=a, b=b))
    assert not change
    _, change = apply(DeduplicateInitializers(), graph(text, a=a, b=a.copy()))
    assert change


def test_the_default_of_an_input_is_left() -> None:
    text = "g (float[N, 3] x, float[3] a = {1, 2, 3}) => (float[N, 3] y) { s = Add (x, a)  y = Mul (s, b) }"
    after, change = apply(DeduplicateInitializers(), graph(text, b=A))
    assert not change
    assert set(initializers(after)) == {"a", "b"}


def test_with_ir_version_3_all_initializers_are_inputs_and_still_constants() -> None:
    text = "g (float[N, 3] x, float[3] a, float[3] b) => (float[N, 3] y) { s = Add (x, a)  y = Mul (s, b) }"
    from cleanup_graphs import model_of

    from onnxslim_llm.rewrite.context import Context

    model = model_of(graph(text, opset=8, ir_version=3, a=A, b=A))
    assert DeduplicateInitializers().apply(model, Context()).sites == ["b"]


def test_an_output_of_the_graph_keeps_its_name() -> None:
    text = "g (float[N, 3] x) => (float[N, 3] y, float[3] b) { s = Add (x, a)  y = Mul (s, b) }"
    after, change = apply(DeduplicateInitializers(), graph(text, a=A, b=A))
    assert set(initializers(after)) == {"a", "b"}
    assert reasons(change) == {"b": "its content equals that of 'a', but it is an output of a graph"}


def test_quantization_annotations_keep_their_tensors() -> None:
    proto = graph(TEXT, a=A, b=A)
    proto.graph.quantization_annotation.add(tensor_name="b")
    after, change = apply(DeduplicateInitializers(), proto)
    assert not change
    assert after.graph.quantization_annotation[0].tensor_name == "b"


def test_sparse_ones_are_left() -> None:
    proto = graph(TEXT, a=A, b=A)
    del proto.graph.initializer[:]
    for name in "ab":
        values = onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [1], [2.0])
        indices = onnx.helper.make_tensor(f"{name}_at", onnx.TensorProto.INT64, [1], [1])
        proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [3]))
    after, change = apply(DeduplicateInitializers(), proto)
    assert not change
    assert len(after.graph.sparse_initializer) == 2


def test_an_initializer_of_a_branch_gives_way_to_one_around_it_but_not_to_its_neighbour() -> None:
    text = """
        g (bool c, float[3] x) => (float[3] y) <float[3] a = {1, 2, 3}> {
            z = Add (x, a)
            y = If (c) <
                then_branch = t () => (float[3] p) <float[3] b = {1, 2, 3}, float[3] k = {4, 5, 6}> {
                    q = Mul (z, b) p = Mul (q, k) },
                else_branch = e () => (float[3] r) <float[3] m = {4, 5, 6}> { r = Sub (z, m) }>
        }"""
    after, change = apply(DeduplicateInitializers(), graph(text))
    assert change.sites == ["b"]
    branches = [attribute.g for attribute in after.graph.node[1].attribute]
    assert [[t.name for t in branch.initializer] for branch in branches] == [["k"], ["m"]]


def test_integers_of_all_sizes() -> None:
    text = "g (int64[N] x) => (int64[N] y) { s = Add (x, a)  t = Add (s, b)  y = Add (t, c) }"
    one = np.array([1], np.int64)
    after, _ = apply(DeduplicateInitializers(), graph(text, a=one, b=one, c=np.array(1)))
    assert list(initializers(after)) == ["a", "c"]
