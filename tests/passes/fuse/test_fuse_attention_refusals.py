"""What looks like an attention and is none stays, with the reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attention_models import attention, fuse_parts
from block_models import model_of

from onnxslim_llm.passes.fuse.fuse_attention import FuseAttention
from onnxslim_llm.rewrite.context import Context

PLAIN_INPUTS = "float[B, S, 32] q, float[B, S, 32] k, float[B, S, 32] v, float[B, 1, S, S] mask"

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "softmax over the queries": (
        {"softmax": "weights = Softmax <axis = 2> (scores)"},
        "runs over another axis than the last at 'weights'",
    ),
    "a scale for each head": (
        {
            "scores": "scaled = Mul (products, per_head)\nscores = Add (scaled, mask)",
            "constants": {"per_head": np.linspace(0.1, 0.4, 4, dtype=np.float32).reshape(4, 1, 1)},
        },
        "scaled by something else than one number at 'scaled'",
    ),
    "a scale after some scores were replaced": (
        {
            "inputs": PLAIN_INPUTS.replace("float[B, 1, S, S] mask", "bool[B, 1, S, S] seen"),
            "scores": "masked = Where (seen, products, lowest)\nscores = Mul (masked, scale)",
        },
        "scaled after a softcap, or after some were replaced",
    ),
    "a scale after the softcap": (
        {"scores": "bent = Tanh (products)\ncapped = Mul (bent, scale)\nscores = Div (capped, scale)"},
        "scaled after a softcap, or after some were replaced",
    ),
    "a softcap after the mask": (
        {"scores": "masked = Add (products, mask)\nbent = Tanh (masked)\nscores = Mul (bent, scale)"},
        "a softcap follows a mask",
    ),
    "scores added to themselves": (
        {"scores": "scaled = Mul (products, scale)\nscores = Add (scaled, products)"},
        "masked with themselves",
    ),
    "tanh without a factor": (
        {"scores": "scores = Tanh (products)"},
        "Tanh is no step of an attention",
    ),
    "mask after the softmax": (
        {"weights": "weights_1 = Mul (weights, mask)", "mix": "mixed = MatMul (weights_1, vt)"},
        "Mul changes the weights after the Softmax",
    ),
    "the scores are an output": (
        {"outputs": "float[B, S, 32] y, float[B, 4, S, S] scores"},
        "an inner tensor is an output of the graph at 'scores'",
    ),
    "the weights are an output": (
        {"outputs": "float[B, S, 32] y, float[B, 4, S, S] weights"},
        "the weights are an output of the graph at 'weights'",
    ),
    "the weights are read twice": (
        {"outputs": "float[B, S, 32] y, float[B, 4, S, S] more", "weights": "more = Relu (weights)"},
        "2 nodes read the weights at 'weights'",
    ),
    "the products are read elsewhere": (
        {"outputs": "float[B, S, 32] y, float[B, 4, S, S] more", "weights": "more = Relu (products)"},
        "an inner tensor is used elsewhere at 'products'",
    ),
    "a number that still weighs": (
        {
            "inputs": PLAIN_INPUTS.replace("float[B, 1, S, S] mask", "bool[B, 1, S, S] seen"),
            "scores": "scores = Where (seen, products, low)",
            "constants": {"low": np.array(-100, np.float32)},
        },
        "replaced by -100, which may still weigh",
    ),
    "scores chosen from two tensors": (
        {
            "inputs": PLAIN_INPUTS + ", bool[B, 1, S, S] seen",
            "scores": "scores = Where (seen, products, mask)",
        },
        "neither branch is a number",
    ),
    "a mask with more heads": (
        {
            "inputs": "float[B, 1, S, 8] qt, float[B, 1, S, 8] k4, float[B, 1, S, 8] vt, float[B, 4, S, S] mask",
            "outputs": "float[B, 4, S, 8] mixed",
            "q": "",
            "k": "kt = Transpose <perm = [0, 1, 3, 2]> (k4)",
            "v": "",
            "result": "",
        },
        "a mask broadcasts the scores",
    ),
    "queries of one head": (
        {
            "inputs": "float[B, 1, S, 8] qt, float[B, 4, S, 8] k4, float[B, 4, S, 8] vt, float[B, 1, S, S] mask",
            "outputs": "float[B, 4, S, 8] mixed",
            "q": "",
            "k": "kt = Transpose <perm = [0, 1, 3, 2]> (k4)",
            "v": "",
            "result": "",
        },
        "the queries are broadcast over the keys",
    ),
    "transposed scores": (
        {"scores": "turned = Transpose <perm = [0, 1, 3, 2]> (products)\nscores = Add (turned, mask)"},
        "Transpose is no step of an attention",
    ),
    "transposed weights": (
        {"mix": "turned = Transpose <perm = [0, 1, 3, 2]> (weights)\nmixed = MatMul (turned, vt)"},
        "Transpose changes the weights",
    ),
    "no product before": (
        {"inputs": "float[B, 4, S, S] scores, float[B, S, 32] v", "q": "", "k": "", "products": "", "scores": ""},
        "do not come from a product of queries and keys at 'scores'",
    ),
    "no product after": (
        {"outputs": "float[B, 4, S, S] y", "v": "", "mix": "", "result": "y = Relu (weights)"},
        "Relu changes the weights",
    ),
    "dropout that is on": (
        {
            "weights": "weights_1, kept = Dropout (weights, ratio, on)",
            "mix": "mixed = MatMul (weights_1, vt)",
            "constants": {"ratio": np.array(0.0, np.float32), "on": np.array(True)},
        },
        "the dropout is not known to be off",
    ),
    "softmax in float64": (
        {
            "softmax": "wide = Cast <to = 11> (scores)\nweights_1 = Softmax <axis = -1> (wide)",
            "weights": "weights = Cast <to = 1> (weights_1)",
        },
        "the scores change their type",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    parts, reason = REFUSED[name]
    fused = fuse_parts(**parts)
    assert not fused.sites
    assert fused.ops["Softmax"] == 1
    assert reason in fused.reasons


@pytest.mark.parametrize(("scale", "reason"), [(0.25, ""), (0.3, "more digits than an attribute")])
def test_double_precision(scale: float, reason: str) -> None:
    fused = fuse_parts(
        inputs=PLAIN_INPUTS.replace("float[", "double["),
        outputs="double[B, S, 32] y",
        constants={"scale": np.array(scale)},
        tolerance=1e-12,
    )
    assert bool(fused.sites) == (not reason)
    assert reason in fused.reasons


def test_a_size_of_zero() -> None:
    fused = fuse_parts(inputs=PLAIN_INPUTS.replace("B,", "0,"), outputs="float[0, S, 32] y")
    assert not fused.sites
    assert "size of 0" in fused.reasons


def test_unknown_ranks() -> None:
    source = attention(
        inputs="float[B, 4, S, 8] qt, float[B, 4, 8, S] kt, float[B, 4, S, 8] vt, float[B, 1, S, S] mask",
        outputs="float[B, 4, S, 8] mixed",
        q="", k="", v="", result="",
    )  # fmt: skip
    for entry in (*source.graph.input, *source.graph.output):
        entry.type.tensor_type.ClearField("shape")
    change = FuseAttention().apply(model_of(source), Context())
    assert not change
    assert "not known" in change.skipped[0].reason


def test_what_is_fused_already_is_counted() -> None:
    source = attention(
        23,
        inputs="float[B, S, 32] q, float[B, S, 32] k, float[B, S, 32] v",
        q="", k="", v="", products="", scores="", softmax="", mix="",
        result="y = Attention <q_num_heads = 4, kv_num_heads = 4> (q, k, v)",
    )  # fmt: skip
    change = FuseAttention().apply(model_of(source), Context())
    assert not change
    assert change.detail["fused_before"] == 1


@pytest.mark.parametrize("step", ["Add ({0}, {0})", "Identity ({0})", "Relu ({0})", "Mul ({0}, scale)"])
@pytest.mark.parametrize("length", [40, 3000])
def test_long_chains_take_no_time_and_no_stack(step: str, length: int) -> None:
    chain = "\n".join(f"t{i + 1} = {step.format(f't{i}')}" for i in range(length))
    source = attention(
        inputs="float[B, S] t0",
        outputs="float[B, S] weights",
        **dict.fromkeys(("q", "k", "v", "products", "mix", "result"), ""),
        scores=chain,
        softmax=f"weights = Softmax <axis = -1> (t{length})",
    )
    change = FuseAttention().apply(model_of(source), Context())
    assert len(change.skipped) == 1


def test_a_long_chain_that_asks_for_empty_rows() -> None:
    chain = "\n".join(f"n{i + 1} = Not (n{i})" for i in range(3000))
    fused = fuse_parts(
        weights=f"n0 = IsInf <detect_positive = 0> (scores)\n{chain}\nkept = Where (n3000, zero, weights)",
        mix="mixed = MatMul (kept, vt)",
    )
    assert not fused.sites
