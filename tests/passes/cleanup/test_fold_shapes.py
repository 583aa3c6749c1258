from __future__ import annotations

import re
from collections import Counter

import numpy as np
import onnx
import pytest
from cleanup_graphs import apply, assert_same_results, feeds, graph, initializers, model_of, ops, reasons

from onnxslim_llm.passes.cleanup.fold_shapes import FoldShapes
from onnxslim_llm.rewrite.context import Context

SHAPES = {"zero": np.array(0), "one": np.array(1), "two": np.array(2), "first": np.array([0]), "minus": np.array([-1])}


def shapes(text: str, opset: int = 17, **more: np.ndarray) -> onnx.ModelProto:
    """A graph that has those of SHAPES that it mentions."""
    used = {name: value for name, value in SHAPES.items() if name in re.findall(r"\w+", text)}
    return graph(text, opset, **used, **more)


def target(proto: onnx.ModelProto) -> list[int]:
    """The constant second input of the last node."""
    found: list[int] = initializers(proto)[proto.graph.node[-1].input[1]].tolist()
    return found


def size(of: str, axis: str, name: str) -> str:
    return f"s{name} = Shape ({of})  g{name} = Gather (s{name}, {axis})  {name} = Unsqueeze (g{name}, first)"


def test_known_sizes_become_numbers() -> None:
    text = "g (float[N, 4, 6] x) => (float[N, 24] y) { s = Shape (x)  p = Gather (s, one)  q = Gather (s, two)"
    text += "  m = Mul (p, q)  mm = Unsqueeze (m, first)  t = Concat <axis = 0> (minus, mm)  y = Reshape (x, t) }"
    after, _ = apply(FoldShapes(), shapes(text))
    assert ops(after) == {"Reshape": 1}
    assert target(after) == [-1, 24]


def test_a_content_that_is_known_becomes_a_constant_of_its_type() -> None:
    text = "g (float[N, 4] x) => (float[N, 4] y) { s = Shape (x)  p = Gather (s, one)"
    text += "  c = Cast <to = 6> (p)  f = Cast <to = 1> (c)  y = Div (x, f) }"
    after, change = apply(FoldShapes(), shapes(text))
    assert ops(after) == {"Cast": 1, "Div": 1}  # the Cast to float is for fold_constants
    assert initializers(after)["c"].dtype == np.int32
    assert "c" in change.sites


def test_sizes_of_the_same_axis_are_copied() -> None:
    text = "g (float[B, S, 12] x) => (float[B, S, 3, 4] y) {" + size("x", "zero", "b") + size("x", "one", "s")
    text += " t = Concat <axis = 0> (b, s, rest)  y = Reshape (x, t) }"
    after, _ = apply(FoldShapes(), shapes(text, rest=np.array([3, 4])))
    assert ops(after) == {"Reshape": 1}
    assert target(after) == [0, 0, 3, 4]


def test_one_other_size_is_found_by_minus_one() -> None:
    text = "g (float[B, S, 12] x, float[M, K] z) => (float[T, 12] y) {" + size("x", "zero", "b") + size("x", "one", "s")
    text += " m = Mul (b, s)  t = Concat <axis = 0> (m, rest)  y = Reshape (x, t) }"
    after, _ = apply(
        FoldShapes(),
        shapes(text.replace("[T, 12]", "[M, 12]").replace(", float[M, K] z", ""), rest=np.array([12])),
        {"B": 2, "S": 5, "M": 10},
    )
    assert target(after) == [-1, 12]


def test_two_unknown_sizes_are_too_many() -> None:
    text = "g (float[K] x, float[M, N] z) => (float[M, N] y) {" + size("z", "zero", "m") + size("z", "one", "n")
    text += " t = Concat <axis = 0> (m, n)  y = Reshape (x, t) }"
    _, change = apply(FoldShapes(), shapes(text), {"K": 12, "M": 4, "N": 3})
    assert reasons(change) == {"y": "2 of its sizes are not known"}


def test_an_empty_cache_keeps_its_reshape() -> None:
    # Reshape <0, -1> of a tensor without elements fails, so -1 must not stand beside a size that can be 0.
    text = "g (float[P, K, 4] past, float[S, K, 4] x) => (float[T, K, 4] all, float[M, P, 4] y) {"
    text += " all = Concat <axis = 0> (past, x)" + size("past", "zero", "p") + size("past", "one", "k")
    text += " t = Concat <axis = 0> (k, p, rest)  y = Reshape (past, t) }"
    proto = shapes(text, rest=np.array([4]))
    sizes = {"P": 2, "K": 6, "S": 5, "T": 7, "M": 6}
    after, change = apply(FoldShapes(), proto, sizes)
    assert "2 of its sizes are not known" in reasons(change).values()
    text = (
        text.replace("float[P, K, 4] past", "float[P, 6, 4] past")
        .replace("[S, K, 4]", "[S, 6, 4]")
        .replace("[T, K, 4]", "[T, 6, 4]")
    )
    text = text.replace("(k, p, rest)", "(k2, p, k3)").replace("float[M, P, 4]", "float[8, P, 3]")
    text = text.replace("Reshape", "Reshape <allowzero = 1>")
    proto = shapes(text, k2=np.array([8]), k3=np.array([3]))
    after, _ = apply(FoldShapes(), proto, sizes)
    assert target(after) == [8, -1, 3]  # the size itself may be 0
    assert_same_results(proto, after, feeds(proto, {**sizes, "P": 0}))


def test_minus_one_beside_a_size_that_may_be_empty() -> None:
    text = "g (float[P, B, 4] past, float[S, B, 4] x) => (float[T, B, 4] all, float[P, M] y) {"
    text += " all = Concat <axis = 0> (past, x)" + size("past", "zero", "p") + size("past", "one", "b")
    text += " q = Mul (b, four)  t = Concat <axis = 0> (p, q)  y = Reshape (past, t) }"
    proto = shapes(text, four=np.array([4]))
    after, change = apply(FoldShapes(), proto, {"P": 3, "B": 2, "S": 5, "T": 8, "M": 8})
    assert reasons(change) == {"y": "a size that may be 0 stands beside the one that -1 would have to find"}
    assert_same_results(proto, after, feeds(proto, {"P": 0, "B": 2, "S": 5, "T": 5, "M": 8}))


def test_minus_one_that_is_there_already_may_move() -> None:
    text = "g (float[B, 2, 3, S, 4] x) => (float[B, 6, S, 4] y) {" + size("x", "zero", "b") + size("x", "three", "s")
    text += " t = Concat <axis = 0> (b, minus, s, four)  y = Reshape (x, t) }"
    after, _ = apply(FoldShapes(), shapes(text, three=np.array(3), four=np.array([4])))
    assert target(after) == [0, 6, -1, 4]


@pytest.mark.parametrize("allowzero", [0, 1])
def test_allowzero_goes_unless_a_zero_is_meant(allowzero: int) -> None:
    text = "g (float[B, S, 12] x) => (float[B, S, 3, 4] y) {" + size("x", "zero", "b") + size("x", "one", "s")
    text += f" t = Concat <axis = 0> (b, s, rest)  y = Reshape <allowzero = {allowzero}> (x, t) }}"
    proto = shapes(text, rest=np.array([3, 4]))
    after, _ = apply(FoldShapes(), proto)
    assert target(after) == [0, 0, 3, 4]
    assert_same_results(proto, after, feeds(proto, {"B": 0, "S": 5}))


def test_a_zero_that_is_meant() -> None:
    text = "g (float[S, 0, 2] x) => (float[0, S] y) {" + size("x", "zero", "s")
    text += " t = Concat <axis = 0> (first, s)  y = Reshape <allowzero = 1> (x, t) }"
    _, change = apply(FoldShapes(), shapes(text))
    assert reasons(change) == {"y": "a size that may be 0 stands beside the one that -1 would have to find"}


def test_the_chain_that_torchscript_writes_for_repeated_heads() -> None:
    text = """
        g (float[B, 2, S, 4] x) => (float[B, 6, S, 4] y) {
            tall = Unsqueeze (x, axis)
            shape = Shape (x)
            b = Gather (shape, first)
            l = Gather (shape, third)
            wanted = Concat <axis = 0> (b, heads, times, l, width)
            ones = ConstantOfShape <value = int64[1] {1}> (five)
            none = Mul (ones, minus)
            same = Equal (wanted, none)
            sizes = Where (same, ones, wanted)
            wide = Expand (tall, sizes)
            flat = Concat <axis = 0> (b, six, l, width)
            y = Reshape (wide, flat)
        }"""
    numbers = {"axis": [2], "third": [2], "heads": [2], "times": [3], "width": [4], "five": [5], "six": [6]}
    after, _ = apply(FoldShapes(), shapes(text, **{name: np.array(value) for name, value in numbers.items()}))
    assert ops(after) == {"Unsqueeze": 1, "Expand": 1, "Reshape": 1}
    assert initializers(after)[after.graph.node[1].input[1]].tolist() == [1, 1, 3, 1, 1]
    assert target(after) == [0, 6, -1, 4]


def test_an_expand_to_the_same_shape_goes() -> None:
    text = "g (float[B, S] x) => (float[B, S] y) { e = Exp (x)  s = Shape (x)  w = Expand (e, s)  y = Neg (w) }"
    after, _ = apply(FoldShapes(), shapes(text))
    assert ops(after) == {"Exp": 1, "Neg": 1}


def test_an_expand_that_repeats_stays() -> None:
    text = "g (float[1, S] x, float[B] z) => (float[B, S] y) {" + size("z", "zero", "b")
    text += " t = Concat <axis = 0> (b, ones)  y = Expand (x, t) }"
    after, change = apply(FoldShapes(), shapes(text, ones=np.array([1])))
    assert ops(after)["Expand"] == 1
    assert reasons(change) == {"y": "it repeats by a size that is not known"}


def test_a_grown_cache_is_the_sum_of_its_parts() -> None:
    text = """
        g (float[B, P] past, float[B, S] x, float[B, S] z) => (float[B, T] y) {
            a = Concat <axis = 1> (past, x)
            b = Concat <axis = 1> (past, z)
            n = Shape (b)
            y = Expand (a, n)
        }"""
    after, _ = apply(FoldShapes(), graph(text))
    assert "Expand" not in ops(after)  # a graph output that the Concat makes now


def test_names_of_outputs_are_not_believed() -> None:
    # The exporter says that y has the size N, which is not so.
    text = "g (float[N] x, float[M] z) => (float[N] y, float[K] w) {"
    text += " y = Concat <axis = 0> (x, z)  s = Shape (x)  w = Expand (y, s) }"
    model = model_of(graph(text))
    FoldShapes().apply(model, Context())
    assert "Expand" in ops(model.to_proto())


@pytest.mark.parametrize(
    ("bounds", "gone"),
    [
        (([0], [2**31 - 1], [1], [1]), True),
        (([0], [4], [1], [1]), True),
        (([-4], [2**63 - 1], [-1], [1]), True),
        (([1], [4], [1], [1]), False),
        (([-1], [-5], [1], [-1]), False),  # turns the axis around
    ],
)
def test_slices_that_take_everything(bounds: tuple[list[int], ...], gone: bool) -> None:
    more = dict(zip("abcd", map(np.array, bounds), strict=True))
    text = "g (float[N, 4] x) => (float[N, M] y) { e = Exp (x)  s = Slice (e, a, b, c, d)  y = Neg (s) }"
    after, _ = apply(FoldShapes(), graph(text, **more), {"N": 3, "M": 4})
    assert ("Slice" not in ops(after)) == gone


def test_a_slice_up_to_the_size_of_the_axis() -> None:
    text = "g (float[B, S] x) => (float[B, S] y) { e = Exp (x)" + size("x", "one", "s")
    text += " p = Slice (e, first, s, axis)  y = Neg (p) }"
    after, _ = apply(FoldShapes(), shapes(text, axis=np.array([1])))
    assert ops(after) == {"Exp": 1, "Neg": 1}


def test_sizes_computed_before_are_used_again() -> None:
    text = """
        g (float[B, S] x, float[B, 4] z) => (float[M, B] y, float[N, B] w) {
            a = Shape (x)  b = Gather (a, first)  c = Concat <axis = 0> (minus, b)  y = Reshape (x, c)
            d = Shape (z)  e = Gather (d, first)  f = Concat <axis = 0> (minus, e)  w = Reshape (z, f)
        }"""
    after, _ = apply(FoldShapes(), shapes(text), {"B": 2, "S": 6, "M": 6, "N": 4})
    assert ops(after) == Counter(Shape=1, Gather=1, Concat=1, Reshape=2)


def test_an_output_of_the_graph_is_left() -> None:
    text = "g (float[2, 3] x) => (int64[2] y) { y = Shape (x) }"
    after, change = apply(FoldShapes(), graph(text))
    assert ops(after) == {"Shape": 1}
    assert not change


def test_shapes_inside_of_a_branch() -> None:
    text = """
        g (bool c, float[B, S, 12] x) => (float[M, N, 3, 4] y) {
            y = If (c) <
                then_branch = t () => (float[M, N, 3, 4] p) {
                    n = Neg (x)  s = Shape (n)  b = Gather (s, pair)
                    r = Concat <axis = 0> (b, rest)  p = Reshape (n, r) },
                else_branch = e () => (float[M, N, 3, 4] q) { q = Reshape (x, known) }>
        }"""
    more = {"pair": np.array([0, 1]), "rest": np.array([3, 4]), "known": np.array([0, 0, 3, 4])}
    after, _ = apply(FoldShapes(), graph(text, **more))
    assert ops(after) == {"If": 1, "Neg": 1, "Reshape": 2}


def test_sizes_that_change_from_one_iteration_to_the_next() -> None:
    text = """
        g (int64 n, bool c, float[N] x) => (float[M] y) {
            y = Loop (n, c, x) <body = b (int64 i, bool go, float[L] v) => (bool go2, float[K] w) {
                go2 = Identity (go)  w = Concat <axis = 0> (v, one) }>
        }"""
    proto = graph(text, one=np.ones(1, np.float32))
    _, change = apply(FoldShapes(), proto, {"N": 3, "M": 4})
    assert not change


def test_unknown_ranks_and_operators_are_no_error() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[N, 4] x) => (float[N, 4] y) {
            a = local.F (x)  s = Shape (a)  e = Expand (x, s)  y = Neg (e)
        }
        <domain: "local", opset_import: ["" : 17]>
        F (p) => (q) { q = Exp (p) }"""
    after, _ = apply(FoldShapes(), graph(text))
    assert ops(after)["Neg"] == 1
