"""Each operator: the numbers of ONNX Runtime, and gradients that agree with differences of the results."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from gradient_models import executor_of, proto_of, runtime_results  # noqa: E402

#: Both sides compute in float32, the sums of these small tensors have a few dozen terms: 1e-6 times a margin.
TOLERANCE = 2e-5

#: Opset, and the body of a graph with x float[2, 3, 4], y likewise, and positive, which is made of y -> z.
FLOAT_CASES = """
20: z = Abs (x)
20: z = Add (x, y)
20: z = Clip (x, low, high)
20: z = Cos (x)
20: z = Div (x, positive)
20: z = Elu <alpha = 0.5> (x)
20: z = Erf (x)
20: z = Exp (x)
20: z = Gelu <approximate = "tanh"> (x)
20: z = Gelu (x)
20: z = HardSigmoid (x)
20: z = HardSwish (x)
20: z = LeakyRelu (x)
20: z = Log (positive)
20: z = Max (x, y)
20: z = Mean (x, y)
20: z = Min (x, y)
20: z = Mod <fmod = 1> (x, positive)
20: z = Mul (x, y)
20: z = Neg (x)
20: z = PRelu (x, slope)
20: two = Constant <value_int = 2> () z = Pow (x, two)
20: cube = Constant <value_float = 3.0> () z = Pow (x, cube)
20: z = Pow (positive, y)
20: z = Reciprocal (positive)
20: z = Relu (x)
20: z = Sigmoid (x)
20: z = Sin (x)
20: z = Softplus (x)
20: z = Sqrt (positive)
20: z = Sub (x, y)
20: z = Sum (x, y, x)
20: z = Tanh (x)
20: c = Less (x, y) n = Not (c) z = Where (n, x, y)
20: g = GreaterOrEqual (x, y) f = Cast <to = 1> (g) l = CastLike (f, x) z = Mul (l, x)
20: z = Concat <axis = -1> (x, y)
20: s = Constant <value_ints = [2, 2, 3, 4]> () z = Expand (x, s)
20: z = Flatten <axis = 2> (x)
20: z = Gather <axis = 2> (x, i)
20: one = Constant <value_int = -1> () z = Gather <axis = 1> (x, one)
20: z = GatherElements <axis = 2> (x, picks)
20: z = ScatterElements <axis = 2> (x, picks, W14)
20: z = ScatterElements <axis = 2, reduction = "add"> (x, picks, W14)
20: z = GatherND (x, places)
20: z = GatherND <batch_dims = 1> (x, column)
20: p = Constant <value_ints = [0, 1, 0, 0, 0, 2]> () z = Pad (x, p)
20: s = Constant <value_ints = [0, -1]> () z = Reshape (x, s)
20: w = Gather <axis = 1> (y, zero) z = ScatterND (x, places, w)
20: z = Slice (x, starts, ends, axes, steps)
20: a, z = Split <axis = 2, num_outputs = 2> (x)
20: n = Constant <value_ints = [1, 3]> () a, z = Split <axis = 2> (x, n)
12: a, z = Split <axis = 2, split = [3, 1]> (x)
20: q = Constant <value_ints = [0, 4]> () u = Unsqueeze (x, q) z = Squeeze (u)
12: u = Unsqueeze <axes = [1]> (x) z = Squeeze <axes = [1]> (u)
20: r = Constant <value_ints = [1, 2, 3]> () z = Tile (x, r)
20: z = Transpose <perm = [2, 0, 1]> (x)
20: z = Transpose (x)
20: z = Trilu <upper = 0> (x)
20: s = Shape <start = 1> (x) o = ConstantOfShape (s) z = Add (o, x)
20: a = Constant <value_int = 2> () z = CumSum <exclusive = 1, reverse = 1> (x, a)
20: k = Constant <value_ints = [2]> () z, n = TopK (x, k)
20: a = Constant <value_ints = [-1]> () z = ReduceMean (x, a)
13: z = ReduceMean <axes = [1, 2], keepdims = 0> (x)
20: z = ReduceSum (x)
13: z = ReduceMax <axes = [-1]> (x)
13: z = ReduceMin <axes = [-1]> (x)
13: z = ReduceL1 <axes = [-1]> (x)
13: z = ReduceL2 <axes = [-1]> (x)
13: z = ReduceProd <axes = [0, 2]> (x)
13: z = ReduceLogSumExp <axes = [-1]> (x)
13: z = ReduceSumSquare <axes = [-1]> (x)
20: z = Softmax <axis = 1> (x)
11: z = Softmax (x)
20: z = LogSoftmax (x)
20: z = LayerNormalization (x, scale, shift)
20: z = LayerNormalization <axis = 1, epsilon = 0.1> (x, wide)
20: z = MatMul (x, W)
20: t = Transpose <perm = [0, 2, 1]> (y) z = MatMul (x, t)
20: f = Flatten <axis = 2> (x) z = Gemm <alpha = 0.5, beta = 2.0> (f, W, bias)
20: f = Flatten <axis = 2> (x) t = Transpose (W) z = Gemm <transB = 1> (f, t)
20: z = Einsum <equation = "bij,jk->bik"> (x, W)
20: z = Conv <pads = [1, 1], strides = [2]> (x, kernel)
20: z = Conv <auto_pad = "SAME_LOWER"> (x, kernel)
20: z = Conv <group = 3, dilations = [2]> (x, depthwise, three)
20: d, m = Dropout (x) z = Identity (d)
"""


def weights() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    shapes = {"W": (4, 5), "bias": (5,), "scale": (4,), "shift": (4,), "wide": (3, 4), "slope": (3, 1)}
    shapes |= {"kernel": (2, 3, 3), "depthwise": (3, 1, 2), "three": (3,), "W14": (1, 1, 4)}
    found = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    found |= {"low": np.float32(-0.3) * np.ones((), np.float32), "high": np.array(0.4, np.float32)}
    lists = {"i": [1, -1], "zero": 0, "picks": [[[3, -2, 0, 1]]], "places": [[1, 0], [0, 2]], "column": [[1], [0]]}
    lists |= {"starts": [1, -1], "ends": [9, -9], "axes": [1, 2], "steps": [1, -2]}
    found |= {name: np.array(value, np.int64) for name, value in lists.items()}
    return found


def body_of(case: str) -> str:
    before = "a_y = Abs (y) offset = Constant <value_float = 0.5> () positive = Add (a_y, offset)"
    return f"agraph (float[2, 3, 4] x, float[2, 3, 4] y) => (float z) {{ {before} {case} }}"


def untyped(proto: Any) -> Any:
    proto.graph.output[0].ClearField("type")
    return proto


@pytest.mark.parametrize("line", FLOAT_CASES.strip().splitlines())
def test_numbers_and_gradients(line: str) -> None:
    opset, case = int(line.split(":")[0]), line.split(": ", 1)[1]
    rng = np.random.default_rng(11)
    feeds = {name: rng.normal(size=(2, 3, 4)).astype(np.float32) for name in ("x", "y")}
    used = {name: array for name, array in weights().items() if re.search(rf"[(,] ?{name}[,)]", case)}
    executor = executor_of(body_of(case), opset, **used)
    expected = runtime_results(untyped(proto_of(body_of(case), opset, **used)), feeds)["z"]
    found = executor.run(feeds)["z"]
    assert tuple(found.shape) == expected.shape
    np.testing.assert_allclose(found.numpy(), expected, rtol=TOLERANCE, atol=TOLERANCE)

    floats = {name: torch.tensor(a).double().requires_grad_() for name, a in used.items() if a.dtype == np.float32}

    def function(x: Any, y: Any, *values: Any) -> Any:
        return executor.run({"x": x, "y": y}, dict(zip(floats, values, strict=True)))["z"]

    inputs = [torch.tensor(feeds[name]).double().requires_grad_() for name in ("x", "y")]
    assert torch.autograd.gradcheck(function, (*inputs, *floats.values()), fast_mode=True)


INTEGER_CASES = """
a = Constant <value_int = -7> () b = Constant <value_int = 2> () c = Div (a, b) z = Add (c, n)
a = Constant <value_int = 2> () z = Mod (n, a)
s = Shape (n) z = Size (s)
o = Constant <value_int = -2> () a = Neg (o) b = Mul (a, o) z = Range (a, b, o)
c = Greater (n, n) d = LessOrEqual (n, n) e = Or (c, d) f = And (e, e) g = Xor (f, c) z = Cast <to = 7> (g)
f = Cast <to = 1> (n) r = Round (f) s = Sign (r) t = Floor (s) c = Ceil (t) z = Cast <to = 6> (c)
z = ArgMax <axis = 1> (n)
z = ArgMin <axis = 0, keepdims = 0> (n)
z = NonZero (n)
d = Constant <value_int = 4> () v = Constant <value_ints = [0, 5]> () z = OneHot (n, d, v)
c = Equal (n, n) z = Where (c, n, n)
f = Cast <to = 1> (n) b = IsNaN (f) i = IsInf (f) c = Or (b, i) z = Cast <to = 9> (c)
"""


@pytest.mark.parametrize("case", INTEGER_CASES.strip().splitlines())
def test_integers(case: str) -> None:
    n = np.array([[3, -2, 0], [1, 3, 2]], np.int64)
    body = f"agraph (int64[2, 3] n) => (int64 z) {{ {case} }}"
    expected = runtime_results(untyped(proto_of(body)), {"n": n})["z"]
    found = executor_of(body).run({"n": n})["z"].numpy()
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
