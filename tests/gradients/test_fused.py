"""Concepts in one expression each: the same results and gradients as the bodies that define them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx import helper

torch = pytest.importorskip("torch")

from onnxslim_llm.concepts.activation import GELU, GELU_TANH, SWISH  # noqa: E402
from onnxslim_llm.concepts.attention import AttentionForm, call_attention  # noqa: E402
from onnxslim_llm.concepts.concept import Concept, inline_call  # noqa: E402
from onnxslim_llm.concepts.normalization import RMS_NORM  # noqa: E402
from onnxslim_llm.concepts.rotary import ROTARY, RotaryPairs  # noqa: E402
from onnxslim_llm.gradients.executor import Executor  # noqa: E402
from onnxslim_llm.ir.model import Model, from_proto  # noqa: E402

#: Two orders of the same float32 sums of at most some dozen numbers around one, and derivatives of them.
TOLERANCE = 2e-5
FORMS = [
    AttentionForm(heads_major=h, past=p, present=p, bias=b, causal=c, window=w, softcap=s, grouped=g, zero_rows=z)
    for h, (p, g), (b, s), (c, w), z in itertools.product(
        (False, True),
        ((False, False), (True, True), (False, True)),
        ((False, False), (True, False), (False, True)),
        ((False, False), (True, False), (True, True)),
        (False, True),
    )
]


def normal(*shape: int) -> Any:
    return torch.from_numpy(np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32))


def model_with(names: list[str], results: list[str]) -> tuple[Model, list[gs.Variable], list[gs.Variable]]:
    inputs, outputs = ([gs.Variable(name, np.dtype(np.float32)) for name in group] for group in (names, results))
    model = from_proto(helper.make_model(helper.make_graph([], "g", [], []), ir_version=9))
    model.set_opset("", 18)
    model.graph.inputs, model.graph.outputs = inputs, outputs
    return model, inputs, outputs


def compare(model: Model, feeds: dict[str, Any]) -> None:
    """Run the call as it is and inlined; compare results and the gradients of all inputs."""
    found = []
    for inline in (False, True):
        if inline:
            model.graph.nodes[:] = inline_call(model, model.graph.nodes[0])
        free = {name: tensor.clone().requires_grad_() for name, tensor in feeds.items()}
        results = Executor(model).run(free)
        sum((result * normal(*result.shape)).sum() for result in results.values()).backward()  # type: ignore[union-attr]
        found.append([*(r.detach() for r in results.values()), *(tensor.grad for tensor in free.values())])
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


def compare_concept(concept: Concept, feeds: dict[str, Any], attributes: dict[str, Any]) -> None:
    model, inputs, outputs = model_with(list(feeds), ["Y"])
    model.graph.nodes.append(concept.call(model, "node", inputs, outputs, attributes))
    compare(model, feeds)


def test_rms_norm() -> None:
    compare_concept(RMS_NORM, {"X": normal(2, 3, 8), "scale": normal(8)}, {"epsilon": 1e-5})


@pytest.mark.parametrize(
    ("concept", "attributes"), [(SWISH, {"alpha": 1.0}), (SWISH, {"alpha": 1.702}), (GELU, {}), (GELU_TANH, {})]
)
def test_activations(concept: Concept, attributes: dict[str, float]) -> None:
    compare_concept(concept, {"X": normal(4, 9)}, attributes)


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("pairs", ["half", "interleaved"])
def test_rotary(pairs: RotaryPairs, size: int) -> None:
    feeds = {"X": normal(2, 5, 3 * 8), "cosines": normal(2, 5, size // 2), "sines": normal(1, 5, size // 2)}
    compare_concept(ROTARY[pairs], feeds, {"num_heads": 3, "rotary_dim": size})


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_attention(form: AttentionForm) -> None:
    batch, length, past, hq, hk, size, value = 2, 5, 3, 4, 2 if form.grouped else 4, 8, 6
    feeds = {"Q": normal(batch, hq, length, size), "K": normal(batch, hk, length, size)}
    feeds["V"] = normal(batch, hk, length, value)
    if not form.heads_major:
        feeds = {name: tensor.transpose(1, 2).flatten(2) for name, tensor in feeds.items()}
    if form.past:
        feeds |= {"past_key": normal(batch, hk, past, size), "past_value": normal(batch, hk, past, value)}
    if form.bias:
        feeds["bias"] = normal(batch, 1, length, length + (past if form.past else 0))
    model, inputs, outputs = model_with(list(form.inputs), list(form.outputs))
    options = {"softcap": 2.0 if form.softcap else 0.0, "window": 3 if form.window else 0}
    node = call_attention(
        model,
        "node",
        form,
        inputs,
        outputs,
        q_num_heads=hq,
        kv_num_heads=hk,
        scale=0.4,
        **options,  # type: ignore[arg-type]
    )
    model.graph.nodes.append(node)
    compare(model, feeds)


def test_a_query_that_sees_nothing_gives_zeros_and_gradients_without_nan() -> None:
    form = AttentionForm(heads_major=True, bias=True, zero_rows=True)
    model, inputs, outputs = model_with(list(form.inputs), list(form.outputs))
    model.graph.nodes.append(
        call_attention(model, "node", form, inputs, outputs, q_num_heads=1, kv_num_heads=1, scale=1.0)
    )
    free = {name: normal(1, 1, 3, 4).requires_grad_() for name in ("Q", "K", "V")}
    bias = torch.zeros(1, 1, 3, 3)
    bias[..., 1, :] = -torch.inf
    y = Executor(model).run({**free, "bias": bias})["Y"]
    assert (y[0, 0, 1] == 0).all()
    y.sum().backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in free.values())  # type: ignore[union-attr]
