"""Which axis runs over tokens after each operator, and which operators are refused."""

from __future__ import annotations

import numpy as np
import pytest
from block_models import model_of, proto, weights

from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.ir.topology import sort_nodes
from onnxslim_llm.passes.fuse.tokens.axes import MixesTokensError, TokenAxes, TokenAxis

BODY = """
    agraph (int64[b, s] ids, float[b, 1] gain) => (float[DIMS] y) {{
        h = Gather (E, ids)
        {}
    }}
"""
CONSTANTS = {
    "E": weights(1, 20, 12),
    "W": weights(2, 12, 8),
    "B": weights(3, 8),
    "one": np.array([1]),
    "two": np.array([2]),
    "last": np.array([-1]),
    "zero": np.array([0]),
    "middle": np.array([1, 3]),
    "heads": np.array([0, 0, 3, 4]),
    "rows": np.array([-1, 12]),
    "mixed": np.array([0, 12, -1]),
    "three": np.array([3]),
}


def axis_of(body: str, dims: str = "b, s, n") -> TokenAxis | None:
    text = BODY.format(body).replace("DIMS", dims)
    used = {name: value for name, value in CONSTANTS.items() if f"{name}," in text or f"{name})" in text}
    model = model_of(proto(text, opset=18, ir_version=8, **used))
    sort_nodes(model.graph)
    values = infer_shapes(model)
    ids = model.graph.inputs[0]
    shape = values.shape_of(ids)
    assert shape is not None
    axes = TokenAxes(model.graph, values, [ids], shape[0], shape[1])  # type: ignore[arg-type]
    return axes.of(model.graph.outputs[0])


@pytest.mark.parametrize(
    ("body", "dims", "expected"),
    [
        ("y = Tanh (h)", "b, s, n", TokenAxis(1, 3)),
        ("y = MatMul (h, W)", "b, s, n", TokenAxis(1, 3)),
        ("p = MatMul (h, W)\n y = Add (B, p)", "b, s, n", TokenAxis(1, 3)),
        ("y = Transpose <perm = [0, 2, 1]> (h)", "b, n, s", TokenAxis(2, 3)),
        ("y = Transpose (h)", "n, s, b", TokenAxis(1, 3)),
        ("y = Unsqueeze (h, middle)", "b, i, s, j, n", TokenAxis(2, 5)),
        ("u = Unsqueeze (h, one)\n y = Squeeze (u, one)", "b, s, n", TokenAxis(1, 3)),
        ("y = ReduceMean (h, last)", "b, s, n", TokenAxis(1, 3)),
        ("y = ReduceMax <keepdims = 0> (h, zero)", "s, n", TokenAxis(0, 2)),
        ("y = Softmax (h)", "b, s, n", TokenAxis(1, 3)),
        ("y = LayerNormalization (h, E_row)", "b, s, n", TokenAxis(1, 3)),
        ("a, y = Split <axis = 2, num_outputs = 2> (h)", "b, s, n", TokenAxis(1, 3)),
        ("y = Slice (h, zero, three, two)", "b, s, n", TokenAxis(1, 3)),
        ("t = Tanh (h)\n y = Concat <axis = -1> (h, t)", "b, s, n", TokenAxis(1, 3)),
        ("y = Gather <axis = 2> (h, three)", "b, s, n", TokenAxis(1, 3)),
        ("y = Reshape (h, heads)", "b, s, n, d", TokenAxis(1, 4)),
        ("y = Reshape (h, rows)", "r, n", TokenAxis(0, 2, flat=True)),
        ("f = Reshape (h, rows)\n y = Gemm (f, W, B)", "r, n", TokenAxis(0, 2, flat=True)),
    ],
    ids=lambda value: value.split(" = ")[-1].split(" (")[0] if isinstance(value, str) else "",
)
def test_axes(body: str, dims: str, expected: TokenAxis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONSTANTS, "E_row", weights(4, 12))
    assert axis_of(body, dims) == expected


def test_what_does_not_depend_on_the_text_has_none() -> None:
    assert axis_of("y = Tanh (gain)", "b, i") is None


@pytest.mark.parametrize(
    ("body", "dims", "reason"),
    [
        ("y = ReduceMean (h, one)", "b, i, n", "along the tokens"),
        ("y = Softmax <axis = 1> (h)", "b, s, n", "along the tokens"),
        ("y = Slice (h, zero, three, one)", "b, s, n", "along the tokens"),
        ("y = Gather <axis = 1> (h, zero)", "b, s, n", "along the tokens"),
        ("t = Tanh (h)\n y = Concat <axis = 1> (h, t)", "b, s, n", "along the tokens"),
        ("a, y = Split <axis = 1, num_outputs = 2> (h)", "b, s, n", "along the tokens"),
        ("t = Transpose <perm = [0, 2, 1]> (h)\n y = MatMul (h, t)", "b, s, t", "not known"),
        ("t = Transpose <perm = [1, 0, 2]> (h)\n y = Add (h, t)", "b, s, n", "different axes"),
        ("y = Reshape (h, mixed)", "b, n, s", "does not keep the tokens together"),
        ("y = CumSum (h, one_0d)", "b, s, n", "CumSum is not known"),
        ("y = Trilu (h)", "b, s, n", "Trilu is not known"),
    ],
)
def test_refusals(body: str, dims: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONSTANTS, "one_0d", np.array(1))
    with pytest.raises(MixesTokensError, match=reason):
        axis_of(body, dims)


def test_a_subgraph() -> None:
    body = """c = Constant <value_int = 1> ()
        k = Cast <to = 9> (c)
        y = If (k) <then_branch = t () => (float[b, s, n] yt) { yt = Tanh (h) },
                    else_branch = e () => (float[b, s, n] ye) { ye = Neg (h) }>"""
    with pytest.raises(MixesTokensError, match="subgraph"):
        axis_of(body)
