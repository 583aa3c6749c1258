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
from onnxslim_llm.passes.lower.weights.lower_ort_cpu_ops import LowerOrtCpuOps
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
        LowerOrtCpuOps(accuracy="exact", epilogues=epilogues, residuals=epilogues).apply(model, Context())
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


RESIDUAL = """agraph (float[b, s, 64] x, float[b, s, 48] r) => (float[b, s, 48] y) {{ {nodes} }}"""
RESIDUAL_ORDER = ["A", "B", "bias", "residual"]


def with_residual(nodes: str, **constants: Array) -> Model:
    model = model_of(proto(RESIDUAL.format(nodes=nodes), 24, 13, CONTRIB, **constants))
    steps = "quantize_weights{min_elements=0, lm_head_bits=4}, pack_projections, lower_ort_cpu_ops{accuracy=exact}"
    Pipeline(steps).run(model, Context())
    return model


@pytest.mark.parametrize(
    ("nodes", "given"),
    [
        ("p = MatMul (x, W) y = Add (p, r)", {"A": "x", "residual": "r"}),
        ("p = MatMul (x, W) y = Add (r, p)", {"A": "x", "residual": "r"}),
        ("p = MatMul (x, W) q = Add (p, b) y = Add (q, r)", {"A": "x", "bias": "b", "residual": "r"}),
        ("p = MatMul (x, W) q = Gelu (p) y = Add (q, r)", {"A": "x", "residual": "r"}),
        # As with a correction of the weight's error: its bias follows.
        ("p = MatMul (x, W) q = Add (p, r) y = Add (q, b)", {"A": "x", "bias": "b", "residual": "r"}),
        # What is added is made after the product.
        ("p = MatMul (x, W) t = Tanh (r) y = Add (p, t)", {"A": "x", "residual": "t"}),
    ],
)
def test_residuals(nodes: str, given: dict[str, str], tmp_path: Path) -> None:
    constants = {"W": weights(1, 64, 48), "b": weights(2, 48)}
    used = {name: value for name, value in constants.items() if f"{name})" in nodes}
    feeds = {"x": weights(5, 2, 3, 64), "r": weights(6, 2, 3, 48)}
    together = with_residual(nodes, **used)
    (node,) = [n for n in together.graph.nodes if n.op == "MatMulPacked"]
    assert not [n for n in together.graph.nodes if n.op == "Add"]
    found = {n: t.name for n, t in zip(RESIDUAL_ORDER, node.inputs, strict=False) if not t.is_empty() and n != "B"}
    assert found == given
    apart = model_of(proto(RESIDUAL.format(nodes=nodes), 24, 13, CONTRIB, **used))
    Pipeline("quantize_weights{min_elements=0, lm_head_bits=4}, lower_portable").run(apart, Context())
    results = []
    for name, model in (("apart", apart), ("together", together)):
        save_model(model, tmp_path / f"{name}.onnx")
        results.append(open_session(tmp_path / f"{name}.onnx", threads=1, optimise=False).run(feeds)["y"])
    assert_close(results[1], results[0], FLOAT_TOLERANCE)


def test_the_sum_of_two_products_is_one_of_them(tmp_path: Path) -> None:
    """As in models whose attention and feed-forward layer run side by side: the first waits for the second."""
    nodes = "p = MatMul (x, W) q = MatMul (x, V) t = Gelu (q) u = MatMul (t, U) s = Add (p, u) y = Add (s, r)"
    together = with_residual(nodes, W=weights(1, 64, 48), V=weights(2, 64, 80), U=weights(3, 80, 48))
    save_model(together, tmp_path / "model.onnx")
    feeds = {"x": weights(5, 2, 3, 64), "r": weights(6, 2, 3, 48)}
    open_session(tmp_path / "model.onnx", threads=1).run(feeds)  # nodes are in order
    (last,) = [n for n in together.graph.nodes if n.outputs[0].name == "y"]
    # One of the products adds the other one; the model's own residual is a sum of its own.
    assert sum(n.op == "Add" for n in together.graph.nodes) == 1
    assert last.op == "Add"


@pytest.mark.parametrize(
    "nodes",
    [
        "p = MatMul (x, W) t = ReduceSum <keepdims = 1> (r) y = Add (p, t)",  # broadcast
        "p = MatMul (x, W) y = Add (p, p)",
        "p = MatMul (x, W) t = Add (p, r) y = Mul (p, t)",  # the product is read elsewhere
        "p = MatMul (x, W) y = Sub (p, r)",
    ],
)
def test_what_is_no_residual(nodes: str) -> None:
    assert len(with_residual(nodes, W=weights(1, 64, 48)).graph.nodes) == nodes.count("=") - nodes.count("keepdims")


def test_an_activation_of_the_sum_is_not_one_of_the_product() -> None:
    model = with_residual("p = MatMul (x, W) q = Add (p, r) y = Gelu (q)", W=weights(1, 64, 48))
    assert [n.op for n in model.graph.nodes] == ["MatMulPacked", "Gelu"]
    assert "activation" not in model.graph.nodes[0].attrs


def test_residuals_can_be_left_alone() -> None:
    model = model_of(proto(RESIDUAL.format(nodes="p = MatMul (x, W) y = Add (p, r)"), 24, 13, W=weights(1, 64, 48)))
    steps = "quantize_weights{min_elements=0, lm_head_bits=4}, lower_ort_cpu_ops{residuals=false}"
    Pipeline(steps).run(model, Context())
    assert [n.op for n in model.graph.nodes] == ["MatMulPacked", "Add"]


def test_residuals_come_apart_again(tmp_path: Path) -> None:
    model = with_residual("p = MatMul (x, W) q = Add (p, b) y = Add (q, r)", W=weights(1, 64, 48), b=weights(2, 48))
    save_model(model, tmp_path / "first.onnx")
    again = open_model(tmp_path / "first.onnx")
    Pipeline("raise_block_weights, lower_ort_cpu").run(again, Context())
    assert [n.op for n in again.graph.nodes] == ["MatMulNBits", "Add", "Add"]
    back = open_model(tmp_path / "first.onnx")
    Pipeline("raise_block_weights, lower_ort_cpu_ops").run(back, Context())
    (old,), (new,) = model.graph.nodes, back.graph.nodes
    assert [t.name for t in old.inputs] == [t.name for t in new.inputs]
    assert old.attrs == new.attrs
