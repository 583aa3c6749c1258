"""What follows a product and becomes part of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from block_models import Array, model_of, proto, weights
from lowering_checks import FLOAT_TOLERANCE, assert_close

from onnxslim_llm.custom_ops import ops
from onnxslim_llm.ir.model import Model, open_model
from onnxslim_llm.ir.save import save_model
from onnxslim_llm.passes.lower.lower_ort_cpu_ops import LowerOrtCpuOps
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.runtime.session import open_session

pytestmark = pytest.mark.skipif(ops.library_path() is None, reason="the operator library was not built here")

HEAD = "agraph (float[m, 64] x) => (float[m, {columns}] y) {{ {nodes} }}"
CONTRIB = ', "com.microsoft" : 1'

SILU = "s = Sigmoid (g) a = Mul (g, s)"
ACTIVATIONS = {
    SILU: "silu",
    "s = Sigmoid (g) a = Mul (s, g)": "silu",
    "a = com.microsoft.QuickGelu <alpha = 1.0> (g)": "silu",
    "a = Swish (g)": "silu",
    "a = Gelu (g)": "gelu",
    'a = Gelu <approximate = "tanh"> (g)': "gelu_tanh",
    "a = com.microsoft.Gelu (g)": "gelu",
    "a = com.microsoft.FastGelu (g)": "gelu_tanh",
}


def lowered(nodes: str, columns: int = 48, **constants: Array) -> tuple[Model, Model]:
    """The quantized model with one product a node, and with what can be part of a product."""
    source = proto(HEAD.format(columns=columns, nodes=nodes), 24, 13, CONTRIB, **constants)
    made = []
    for epilogues in (False, True):
        model = model_of(source)
        steps = "quantize_weights{min_elements=0, lm_head_bits=4}, pack_projections"
        Pipeline(steps).run(model, Context())
        LowerOrtCpuOps(accuracy="exact", epilogues=epilogues).apply(model, Context())
        made.append(model)
    return made[0], made[1]


def check(nodes: str, folder: Path, columns: int = 48, **constants: Array) -> dict[str, Any]:
    """Same results with one node; returns its attributes and number of inputs."""
    apart, together = lowered(nodes, columns, **constants)
    x = {"x": weights(9, 5, 64)}
    results = []
    for name, model in (("apart", apart), ("together", together)):
        save_model(model, folder / f"{name}.onnx")
        results.append(open_session(folder / f"{name}.onnx", threads=1).run(x)["y"])
    assert_close(results[1], results[0], FLOAT_TOLERANCE)
    (node,) = [n for n in together.graph.nodes if n.op != "Constant"]
    return {**node.attrs, "inputs": len(node.inputs)}


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(activation: str, tmp_path: Path) -> None:
    nodes = "g = MatMul (x, W) " + re.sub(r"\ba = ", "y = ", activation)
    found = check(nodes, tmp_path, W=weights(1, 64, 48))
    assert found["activation"] == ACTIVATIONS[activation]
    assert found["inputs"] == 2


@pytest.mark.parametrize("order", ["p, b", "b, p"])
def test_a_bias_and_what_follows_it(order: str, tmp_path: Path) -> None:
    nodes = f"p = MatMul (x, W) g = Add ({order}) y = Gelu (g)"
    found = check(nodes, tmp_path, W=weights(1, 64, 48), b=weights(2, 48))
    assert (found["activation"], found["inputs"]) == ("gelu", 3)


def test_a_bias_alone(tmp_path: Path) -> None:
    found = check("p = MatMul (x, W) y = Add (p, b)", tmp_path, W=weights(1, 64, 48), b=weights(2, 48))
    assert ("activation" in found, found["inputs"]) == (False, 3)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gates(activation: str, swapped: bool, tmp_path: Path) -> None:
    """Gate and up projection, in the order of the nodes or the other way round."""
    products = ["g = MatMul (x, W)", "u = MatMul (x, V)"]
    nodes = f"{' '.join(reversed(products) if swapped else products)} {activation} y = Mul (a, u)"
    found = check(nodes, tmp_path, W=weights(1, 64, 48), V=weights(2, 64, 48))
    assert (found["activation"], found["N"], found["inputs"]) == (f"{ACTIVATIONS[activation]}_gate", 96, 2)


def test_gates_with_biases(tmp_path: Path) -> None:
    nodes = f"p = MatMul (x, W) q = MatMul (x, V) g = Add (p, b) u = Add (q, c) {SILU} y = Mul (u, a)"
    constants = {"W": weights(1, 64, 48), "V": weights(2, 64, 48), "b": weights(3, 48), "c": weights(4, 48)}
    found = check(nodes, tmp_path, **constants)
    assert (found["activation"], found["inputs"]) == ("silu_gate", 3)


@pytest.mark.parametrize(
    "nodes",
    [
        "p = MatMul (x, W) y = Add (p, p)",  # no constant
        "p = MatMul (x, W) y = Add (p, row)",  # not one value a column
        "p = MatMul (x, W) s = Sigmoid (p) y = Mul (s, s)",  # not SiLU
        "p = MatMul (x, W) s = Sigmoid (p) t = Mul (p, s) y = Add (t, p)",  # the product is read elsewhere
        "p = MatMul (x, W) y = com.microsoft.QuickGelu (p)",  # alpha = 1.702
        "p = MatMul (x, W) y = com.microsoft.FastGelu (p, b)",  # a bias of its own
        "g = MatMul (x, W) u = MatMul (x, V) y = Mul (g, u)",  # no activation
        f"g = MatMul (x, W) u = MatMul (x, V) {SILU} t = Mul (a, u) y = Add (t, a)",  # the gate is read elsewhere
        f"g = MatMul (x, W) u = MatMul (x, V) {SILU} t = Mul (a, u) y = Add (t, u)",
        f"g = MatMul (x, W) u = MatMul (x, V) {SILU} y = Add (a, u)",
    ],
)
def test_what_is_left(nodes: str) -> None:
    constants = {"W": weights(1, 64, 48), "b": weights(2, 48), "row": weights(3, 1, 48), "V": weights(4, 64, 48)}
    apart, together = lowered(nodes, **{name: value for name, value in constants.items() if name in nodes})
    assert [n.op for n in together.graph.nodes] == [n.op for n in apart.graph.nodes]


def test_what_is_a_graph_output_stays() -> None:
    text = "agraph (float[m, 64] x) => (float[m, 48] y, float[m, 48] p) { p = MatMul (x, W) y = Gelu (p) }"
    model = model_of(proto(text, 24, 13, W=weights(1, 64, 48)))
    Pipeline("quantize_weights{min_elements=0, lm_head_bits=4}, lower_ort_cpu_ops").run(model, Context())
    assert [n.op for n in model.graph.nodes] == ["MatMulPacked", "Gelu"]


def test_gates_come_apart_and_together_again(tmp_path: Path) -> None:
    nodes = f"g = MatMul (x, W) u = MatMul (x, V) {SILU} y = Mul (a, u)"
    _, model = lowered(nodes, W=weights(1, 64, 48), V=weights(2, 64, 48))
    save_model(model, tmp_path / "first.onnx")
    again = open_model(tmp_path / "first.onnx")
    Pipeline("raise_block_weights, pack_projections, lower_ort_cpu_ops").run(again, Context())
    save_model(again, tmp_path / "second.onnx")
    before, after = (open_model(tmp_path / f"{name}.onnx") for name in ("first", "second"))
    (old,), (new,) = before.graph.nodes, after.graph.nodes
    assert old.attrs == new.attrs
    assert np.array_equal(old.inputs[1].values, new.inputs[1].values)
