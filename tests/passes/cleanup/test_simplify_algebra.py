"""Each equation where it holds, and where it does not."""
# ruff: noqa: E501 (one equation a line)

from __future__ import annotations

import numpy as np
import pytest
from cleanup_graphs import apply, graph, model_of, ops

from onnxslim_llm.passes.cleanup.facts import widens
from onnxslim_llm.passes.cleanup.simplify_algebra import RULES, SimplifyAlgebra
from onnxslim_llm.rewrite.context import Context

ZERO, ONE, HALF = np.array(0.0, np.float32), np.array(1.0, np.float32), np.array(0.5, np.float32)
TRUE, FALSE = np.array(True), np.array(False)

#: (name, body, initializers, operators that are left). x is float[N, 4], b is bool[N, 4], i is int64[N, 4].
HOLDS = [
    ("x + 0 -> x", "e = Exp (x)  s = Add (k, e)  y = Neg (s)", {"k": ZERO}, "Exp Neg"),
    ("x + 0 -> x", "e = Exp (x)  s = Add (e, k)  y = Neg (s)", {"k": np.zeros(4, np.float32)}, "Exp Neg"),
    ("x - 0 -> x", "e = Exp (x)  s = Sub (e, k)  y = Neg (s)", {"k": ZERO}, "Exp Neg"),
    ("x * 1 -> x", "e = Exp (x)  s = Mul (e, k)  y = Neg (s)", {"k": np.ones((1, 1), np.float32)}, "Exp Neg"),
    ("x / 1 -> x", "e = Exp (x)  s = Div (e, k)  y = Neg (s)", {"k": ONE}, "Exp Neg"),
    ("x ** 1 -> x", "e = Exp (x)  s = Pow (e, k)  y = Neg (s)", {"k": np.array(1)}, "Exp Neg"),
    ("x and true -> x", "n = Not (b)  s = And (n, k)  y = Cast <to = 1> (s)", {"k": TRUE}, "Not Cast"),
    ("x or false -> x", "n = Not (b)  s = Or (k, n)  y = Cast <to = 1> (s)", {"k": FALSE}, "Not Cast"),
    ("x xor false -> x", "n = Not (b)  s = Xor (n, k)  y = Cast <to = 1> (s)", {"k": FALSE}, "Not Cast"),
    ("not not x -> x", "n = Not (b)  s = Not (n)  y = Cast <to = 1> (s)", {}, "Cast"),
    ("--x -> x", "n = Neg (x)  s = Neg (n)  y = Exp (s)", {}, "Exp"),
    ("relu(relu(x)) -> relu(x)", "n = Relu (x)  s = Relu (n)  y = Exp (s)", {}, "Relu Exp"),
    ("floor(floor(x)) -> floor(x)", "n = Floor (x)  y = Floor (n)", {}, "Floor"),
    ("max(x) -> x", "n = Max (x)  s = Sum (n)  y = Exp (s)", {}, "Exp"),
    ("clip(x) -> x", "n = Clip (x)  y = Exp (n)", {}, "Exp"),
    ("where(true, x, y) -> x", "e = Exp (x)  s = Where (k, e, z)  y = Neg (s)", {"k": np.ones((1, 4), bool), "z": ZERO}, "Exp Neg"),
    ("where(false, x, y) -> y", "e = Exp (x)  s = Where (k, z, e)  y = Neg (s)", {"k": FALSE, "z": ZERO}, "Exp Neg"),
    ("where(c, x, x) -> x", "e = Exp (x)  s = Where (b, e, e)  y = Neg (s)", {}, "Exp Neg"),
    ("dropout(x) -> x", "e = Exp (x)  s = Dropout (e, k, t)  y = Neg (s)", {"k": HALF, "t": FALSE}, "Exp Neg"),
    ("cast(x, type of x) -> x", "e = Exp (x)  s = Cast <to = 1> (e)  y = Neg (s)", {}, "Exp Neg"),
    ("cast(cast(x, wider), t) -> cast(x, t)", "d = Cast <to = 11> (x)  s = Cast <to = 10> (d)  y = Cast <to = 1> (s)", {}, "Cast Cast"),
    ("cast(cast(x, wider), t) -> cast(x, t)", "d = Cast <to = 7> (b)  y = Cast <to = 1> (d)", {}, "Cast"),
    ("castlike(x, y) -> cast(x)", "e = Exp (x)  s = CastLike (e, x)  y = Neg (s)", {}, "Exp Neg"),
    ("castlike(x, y) -> cast(x)", "y = CastLike (i, x)", {}, "Cast"),
    ("identity(x) -> x", "e = Identity (x)  y = Neg (e)", {}, "Neg"),
    ("transpose(x, 0 1 2) -> x", "e = Transpose <perm = [0, 1]> (x)  y = Neg (e)", {}, "Neg"),
    ("transpose(transpose(x)) -> transpose(x)", "e = Transpose (x)  s = Transpose <perm = [1, 0]> (e)  y = Neg (s)", {}, "Neg"),
    ("reshape(reshape(x)) -> reshape(x)", "e = Reshape (x, j)  s = Reshape (e, k)  y = Neg (s)", {"j": np.array([4, -1]), "k": np.array([-1, 4])}, "Reshape Neg"),
    ("reshape(reshape(x)) -> reshape(x)", "e = Unsqueeze (x, j)  s = Reshape (e, k)  y = Neg (s)", {"j": np.array([1]), "k": np.array([-1, 4])}, "Reshape Neg"),
    ("reshape(reshape(x)) -> reshape(x)", "e = Unsqueeze (x, j)  s = Reshape (e, k)  y = Neg (s)", {"j": np.array([1]), "k": np.array([0, -1])}, "Reshape Neg"),
    ("squeeze(unsqueeze(x)) -> x", "e = Unsqueeze (x, j)  s = Squeeze (e, k)  y = Neg (s)", {"j": np.array([1, 3]), "k": np.array([-1, 1])}, "Neg"),
    ("unsqueeze(squeeze(x)) -> x", "u = ReduceSum (x, j)  e = Squeeze (u, j)  f = Unsqueeze (e, j)  y = Add (x, f)", {"j": np.array([1])}, "ReduceSum Add"),
    ("slice(x, all) -> x", "e = Exp (x)  s = Slice (e, j, k)  y = Neg (s)", {"j": np.array([0]), "k": np.array([2**31 - 1])}, "Exp Neg"),
    ("split(x, 1) -> x", "e = Exp (x)  s = Split <axis = 1> (e, j)  y = Neg (s)", {"j": np.array([4])}, "Exp Neg"),
    ("expand(x, ones) -> x", "e = Exp (x)  s = Expand (e, j)  y = Neg (s)", {"j": np.array([1, 1])}, "Exp Neg"),
    ("tile(x, ones) -> x", "e = Exp (x)  s = Tile (e, j)  y = Neg (s)", {"j": np.array([1, 1])}, "Exp Neg"),
    ("pad(x, zeros) -> x", "e = Exp (x)  s = Pad (e, j, k)  y = Neg (s)", {"j": np.zeros(4, np.int64), "k": ONE}, "Exp Neg"),
    ("concat(x) -> x", "e = Concat <axis = 1> (x)  y = Neg (e)", {}, "Neg"),
    ("transpose(f(transpose(x))) -> transpose(f(x))", "e = Transpose (x)  s = Neg (e)  t = Transpose (s)  y = Exp (t)", {}, "Neg Exp"),
    ("transpose(f(transpose(x))) -> transpose(f(x))", "e = Transpose (x)  s = Slice (e, j, k, a)  t = Transpose (s)  u = ReduceMax <axes = [1]> (t)  v = ReduceMax <axes = [0]> (e)  y = Add (u, v)", {"j": np.array([1]), "k": np.array([3]), "a": np.array([-2])}, "Slice Transpose ReduceMax ReduceMax Add"),
    ("transpose(f(transpose(x))) -> transpose(f(x))", "e = Transpose (x)  s, v = Split <axis = 0> (e, j)  t = Transpose (s)  w = Transpose (v)  y = Sub (t, w)", {"j": np.array([2, 2])}, "Slice Slice Sub"),
    ("transpose(f(transpose(x))) -> transpose(f(x))", "d = Unsqueeze (x, j)  e = Transpose <perm = [1, 0, 2]> (d)  s = LayerNormalization (e, k)  t = Transpose <perm = [2, 0, 1]> (s)  y = ReduceMax <axes = [2], keepdims = 0> (t)", {"j": np.array([0]), "k": np.ones(4, np.float32)}, "Unsqueeze LayerNormalization Transpose ReduceMax"),
    ("transpose(f(transpose(x))) -> transpose(f(x))", "e = Transpose (x)  s = Sub (k, e)  t = Transpose (s)  y = Exp (t)", {"k": HALF}, "Sub Exp"),
    ("transpose(matmul(column, unsqueeze(x))) -> unsqueeze(x) * row", "u = Unsqueeze (x, j)  m = MatMul (k, u)  t = Transpose <perm = [0, 2, 1]> (m)  y = ReduceMax <axes = [2], keepdims = 0> (t)", {"j": np.array([1]), "k": np.ones((1, 3, 1), np.float32)}, "Unsqueeze Mul ReduceMax"),
    ("transpose(matmul(column, unsqueeze(x))) -> unsqueeze(x) * row", "r0 = ReduceMax <axes = [0], keepdims = 0> (x)  u = Unsqueeze (r0, j)  m = MatMul (k, u)  t = Transpose <perm = [0, 2, 1]> (m)  y = ReduceMax <axes = [0], keepdims = 0> (t)", {"j": np.array([0, 1]), "k": np.ones((1, 3, 1), np.float32)}, "ReduceMax Unsqueeze Mul ReduceMax"),
    ("transpose(matmul(column, unsqueeze(x))) -> unsqueeze(x) * row, cast", "u = Unsqueeze (i, j)  c = Cast <to = 1> (u)  m = MatMul (k, c)  t = Transpose <perm = [0, 2, 1]> (m)  y = ReduceMax <axes = [2], keepdims = 0> (t)", {"j": np.array([-2]), "k": np.ones((3, 1), np.float32)}, "Unsqueeze Cast Mul ReduceMax"),
    ("gathernd(x, [[i]]) -> slice(x, i, i + 1)", "e = GatherND (x, j)  f = GatherND (x, k)  y = Add (e, f)", {"j": np.array([[0]]), "k": np.array([[-1]])}, "Slice Slice Add"),
    ("f(expand(x), y) -> f(x, y)", "j = Shape (x)  e = Expand (r, j)  y = Mul (e, x)", {}, "Mul"),
    ("f(expand(x), y) -> f(x, y)", "e = Expand (k, j)  y = Where (b, e, x)", {"k": ONE, "j": np.array([4])}, "Where"),
    ("f(expand(x), y) -> f(x, y)", "u = Unsqueeze (x, l)  j = Shape (x)  h = Gather (j, z)  o = Concat <axis = 0> (h, i1, i1)  e = Expand (k, o)  m = MatMul (u, e)  y = ReduceMax <axes = [1], keepdims = 0> (m)", {"k": np.ones((1, 4, 4), np.float32), "l": np.array([1]), "z": np.array([0]), "i1": np.array([1])}, "Unsqueeze MatMul ReduceMax"),
    ("concat(concat(a, b), c) -> concat(a, b, c)", "e = Exp (x)  s = Concat <axis = 0> (x, e)  t = Concat <axis = -2> (s, x)  y = ReduceMax <axes = [0]> (t)", {}, "Exp Concat ReduceMax"),
]  # fmt: skip

#: The same, where an equation seems to fit and does not.
DOES_NOT_HOLD = [
    ("broadcast", "y = Add (r, k)", {"k": np.zeros((3, 4), np.float32)}),
    ("more axes", "s = Mul (x, k)  y = ReduceMax <axes = [0], keepdims = 0> (s)", {"k": np.ones((1, 1, 1), np.float32)}),
    ("nearly one", "y = Mul (x, k)", {"k": np.array(1 + 2**-22, np.float32)}),
    ("0 - x", "y = Sub (k, x)", {"k": ZERO}),
    ("1 / x", "y = Div (k, x)", {"k": ONE}),
    ("x and false", "s = And (b, k)  y = Cast <to = 1> (s)", {"k": FALSE}),
    ("clip with a limit", "y = Clip (x, k)", {"k": ZERO}),
    ("where with both", "y = Where (k, x, z)", {"k": np.array([[True, False, True, True]]), "z": ZERO}),
    ("where that broadcasts", "y = Where (k, r, x)", {"k": np.ones((1, 4), bool)}),
    ("where of one row", "y = Where (b, r, r)", {}),
    ("double to float and back", "h = Cast <to = 10> (x)  y = Cast <to = 1> (h)", {}),
    ("float to int", "h = Cast <to = 7> (x)  y = Cast <to = 1> (h)", {}),
    ("int64 through float", "h = Cast <to = 1> (i)  j = Cast <to = 7> (h)  y = Cast <to = 1> (j)", {}),
    ("transposed", "t = Transpose (x)  e = Exp (t)  y = Transpose (e)", {}),
    ("reshape that copies from between", "e = Reshape (x, j)  y = Reshape (e, k)", {"j": np.array([4, -1]), "k": np.array([0, -1])}),
    ("squeeze of another axis", "u = Unsqueeze (r, j)  s = Squeeze (u, k)  y = Neg (s)", {"j": np.array([0]), "k": np.array([2])}),
    ("two unsqueezes", "u = Unsqueeze (x, j)  v = Unsqueeze (u, j)  y = ReduceMax <axes = [0, 1], keepdims = 0> (v)", {"j": np.array([0])}),
    ("slice of a part", "s = Slice (x, j, k, a)  y = Add (x, s)", {"j": np.array([0]), "k": np.array([1]), "a": np.array([1])}),
    ("expand that adds an axis", "s = Expand (x, j)  y = ReduceMax <axes = [0], keepdims = 0> (s)", {"j": np.array([1, 1, 1])}),
    ("tile", "s = Tile (r, j)  y = Add (x, s)", {"j": np.array([1, 4])}),
    ("pad", "s = Pad (x, j, k)  y = ReduceMax <axes = [0]> (s)", {"j": np.array([1, 0, 0, 0]), "k": ONE}),
    ("softmax of another axis", "t = Transpose (x)  e = Softmax (t)  y = Transpose (e)", {}),
    ("norm of a moved axis", "u = Unsqueeze (r, j)  t = Transpose <perm = [1, 2, 0]> (u)  e = LayerNormalization (t, k)  s = Transpose <perm = [2, 0, 1]> (e)  y = ReduceMax <axes = [2], keepdims = 0> (s)", {"j": np.array([0]), "k": np.ones(1, np.float32)}),
    ("norm of two axes", "u = Unsqueeze (r, j)  t = Transpose <perm = [1, 0, 2]> (u)  e = LayerNormalization <axis = 1> (t, k)  s = Transpose <perm = [1, 0, 2]> (e)  y = ReduceMax <axes = [0], keepdims = 0> (s)", {"j": np.array([0]), "k": np.ones((1, 1), np.float32)}),
    ("negated and read", "t = Transpose (x)  e = Neg (t)  s = Transpose (e)  u = ReduceMax <axes = [0]> (s)  v = ReduceMax <axes = [1]> (e)  w = Transpose (v)  y = Add (u, w)", {}),
    ("shifted by a row", "t = Transpose (x)  e = Add (t, k)  y = Transpose (e)", {"k": np.ones((4, 1), np.float32)}),
    ("outer product of several", "u = Unsqueeze (x, j)  m = MatMul (k, u)  t = Transpose <perm = [0, 2, 1]> (m)  y = ReduceMax <axes = [2], keepdims = 0> (t)", {"j": np.array([1]), "k": np.ones((3, 3, 1), np.float32)}),
    ("outer product turned otherwise", "u = Unsqueeze (x, j)  m = MatMul (k, u)  t = Transpose <perm = [1, 0, 2]> (m)  y = ReduceMax <axes = [0], keepdims = 0> (t)", {"j": np.array([1]), "k": np.ones((1, 3, 1), np.float32)}),
    ("product with a matrix", "u = Unsqueeze (x, j)  m = MatMul (k, u)  t = Transpose <perm = [0, 2, 1]> (m)  y = ReduceMax <axes = [2], keepdims = 0> (t)", {"j": np.array([2]), "k": np.ones((1, 3, 4), np.float32)}),
    ("two rows at once", "y = GatherND (x, j)", {"j": np.array([[0], [1]])}),
    ("expand alone", "e = Expand (r, j)  y = Mul (e, k)", {"j": np.array([1, 4]), "k": np.full((1, 1), 2, np.float32)}),
    ("expand of a matrix", "e = Expand (r, j)  y = MatMul (e, k)", {"j": np.array([1, 4]), "k": np.ones((4, 4), np.float32)}),
    ("concat along another axis", "s = Concat <axis = 0> (x, x)  t = Concat <axis = 1> (s, s)  y = ReduceMax <axes = [0, 1]> (t)", {}),
    ("concat used twice", "s = Concat <axis = 0> (x, x)  t = Concat <axis = 0> (s, x)  u = ReduceMax <axes = [0]> (s)  v = ReduceMax <axes = [0]> (t)  y = Add (u, v)", {}),
]  # fmt: skip


def build(body: str, more: dict[str, np.ndarray]) -> object:
    inputs = {"x": "float[N, 4] x", "b": "bool[N, 4] b", "i": "int64[N, 4] i", "r": "float[N, 1] r"}
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    used = ", ".join(text for name, text in inputs.items() if name in words)
    return graph(f"g ({used}) => (float[O, Q] y) {{ {body} }}", **more)


@pytest.mark.parametrize(("name", "body", "more", "left"), HOLDS, ids=[f"{i} {row[0]}" for i, row in enumerate(HOLDS)])
def test_it_holds(name: str, body: str, more: dict[str, np.ndarray], left: str) -> None:
    after, change = apply(SimplifyAlgebra(), build(body, more))
    assert sorted(ops(after).elements()) == sorted(left.split())
    assert name in change.detail["rules"]


@pytest.mark.parametrize(("name", "body", "more"), DOES_NOT_HOLD, ids=[row[0] for row in DOES_NOT_HOLD])
def test_it_does_not_hold(name: str, body: str, more: dict[str, np.ndarray]) -> None:
    _, change = apply(SimplifyAlgebra(), build(body, more))
    assert not change


def test_every_equation_is_tested() -> None:
    families = {rule.name for rule in RULES} - {row[0] for row in HOLDS}
    assert families == {f"{f}({f}(x)) -> {f}(x)" for f in ("abs", "ceil", "round", "sign")}  # like relu and floor


def test_dropout_in_training_or_with_its_mask_read_stays() -> None:
    for more, text in (
        ({"t": TRUE}, "g (float[N] x) => (float[N] y) { y = Dropout (x, k, t) }"),
        ({"t": FALSE}, "g (float[N] x) => (float[N] y, bool[N] m) { y, m = Dropout (x, k, t) }"),
    ):
        assert not SimplifyAlgebra().apply(model_of(graph(text, k=np.array(0.0, np.float32), **more)), Context())


def test_shapes_that_are_not_known_refuse() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 17, "unknown" : 1]>
        g (float[N, 4] x) => (float[N, 4] y) { a = unknown.F (x)  b = Add (a, k)  y = Neg (b) }"""
    model = model_of(graph(text, k=np.zeros((1, 1), np.float32)))
    assert not SimplifyAlgebra().apply(model, Context())
    model = model_of(graph(text, k=ZERO))  # a scalar changes no shape
    assert SimplifyAlgebra().apply(model, Context())


def test_an_output_keeps_its_name_and_a_passed_input_its_identity() -> None:
    after, _ = apply(
        SimplifyAlgebra(),
        graph(
            "g (float[N] x) => (float[N] y, float[N] z) { y = Add (x, k)  e = Exp (x)  z = Mul (e, l) }", k=ZERO, l=ONE
        ),
    )
    assert [(n.op_type, n.output[0]) for n in after.graph.node] == [("Identity", "y"), ("Exp", "z")]


def test_old_opsets() -> None:
    text = "g (float[N, 4] x) => (float[N, 4] y) { d = Dropout <ratio = 0.5> (x)  u = Unsqueeze <axes = [0]> (d)  s = Squeeze <axes = [0]> (u)  p = Slice <starts = [0], ends = [2147483647], axes = [0]> (s)  y = Neg (p) }"
    after, _ = apply(SimplifyAlgebra(), graph(text, 9))
    assert ops(after) == {"Neg": 1}


@pytest.mark.parametrize("opset", [7, 13, 17, 21])
def test_opsets(opset: int) -> None:
    text = "g (float[N, 4] x) => (float[N, 4] y) { a = Cast <to = 1> (x)  t = Transpose (a)  u = Transpose (t)  y = Neg (u) }"
    after, _ = apply(SimplifyAlgebra(), graph(text, opset))
    assert ops(after) == {"Neg": 1}


def test_inside_of_branches() -> None:
    text = """
        g (bool c, float[N] x) => (float[N] y) {
            y = If (c) <
                then_branch = a () => (float[N] p) { q = Neg (x)  r = Neg (q)  p = Exp (r) },
                else_branch = b () => (float[N] s) { t = Identity (x)  s = Sin (t) }>
        }"""
    after, _ = apply(SimplifyAlgebra(), graph(text))
    assert ops(after) == {"If": 1, "Exp": 1, "Sin": 1}


def test_widening_is_a_partial_order_of_types() -> None:
    from onnx import TensorProto as T

    assert widens(T.FLOAT16, T.FLOAT)
    assert widens(T.BFLOAT16, T.FLOAT)
    assert widens(T.BOOL, T.INT8)
    assert widens(T.UINT8, T.INT16)
    assert not widens(T.UINT8, T.INT8)
    assert not widens(T.FLOAT16, T.BFLOAT16)
    assert not widens(T.BFLOAT16, T.FLOAT16)
    assert not widens(T.INT8, T.UINT64)
    assert not widens(T.INT8, T.BOOL)
    assert not widens(T.INT32, T.DOUBLE)  # another kind of number
