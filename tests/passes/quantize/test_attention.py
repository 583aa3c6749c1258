from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from block_models import model_of, proto, weights

from onnxslim_llm.ir.model import Model, open_model
from onnxslim_llm.passes.fuse.fuse_attention import FuseAttention
from onnxslim_llm.passes.quantize.quantize_weights import QuantizeWeights
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.pipeline import Pipeline

WIDTH = 32

BLOCK = """
    q{i} = MatMul (x{i}, q_proj{i})
    k{i} = MatMul (x{i}, k_proj{i})
    {values}
    kt{i} = Transpose <perm = [0, 2, 1]> (k{i})
    scores{i} = MatMul (q{i}, kt{i})
    masked{i} = Add (scores{i}, mask)
    p{i} = Softmax (masked{i})
    {weighed}
    o{i} = MatMul (c{i}, o_proj{i})
    r{i} = Add (x{i}, o{i})
    u{i} = MatMul (r{i}, up_proj{i})
    g{i} = Sigmoid (u{i})
    d{i} = MatMul (g{i}, down_proj{i})
    x{next} = Add (r{i}, d{i})
"""
PLAIN = {"values": "v{i} = MatMul (x{i}, v_proj{i})", "weighed": "c{i} = MatMul (p{i}, v{i})"}


def model_with(blocks: int = 3, extra: dict[str, Any] | None = None, **parts: str) -> Model:
    parts = {**PLAIN, **parts}
    body, initializers = "", dict(extra or {})
    for i in range(blocks):
        names = {"i": i, "next": i + 1}
        body += BLOCK.format(**names, **{key: text.format(**names) for key, text in parts.items()})
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"):
            if f"{name}{i}" in body:
                initializers[f"{name}{i}"] = weights(i, WIDTH, WIDTH)
    text = f"""agraph (float[1, s, {WIDTH}] x, float[1, s, s] mask) => (float[1, s, {WIDTH}] y) {{
        x0 = Relu (x)
        {body}
        y = Relu (x{blocks})
    }}"""
    return model_of(proto(text, **initializers))


def sensitive(model: Model) -> dict[str, list[str]]:
    """Weight -> in which ways it is sensitive, as the account of the pass says; weights that are not are left out."""
    change = QuantizeWeights(min_elements=0).apply(model, Context())
    kinds = {"value", "output", "first_block"}
    found = {entry["name"]: sorted(kinds & set(entry["roles"])) for entry in change.detail["tensors"]}
    return {name: ways for name, ways in found.items() if ways}


def expected(blocks: int, value: str = "v_proj", output: str = "o_proj") -> dict[str, list[str]]:
    first = {f"{name}0": ["first_block"] for name in ("q_proj", "k_proj", "up_proj", "down_proj")}
    first |= {f"{value}0": ["first_block", "value"], f"{output}0": ["first_block", "output"]}
    return first | {f"{n}{i}": [w] for i in range(1, blocks) for n, w in ((value, "value"), (output, "output"))}


def test_projections_are_told_by_the_flow() -> None:
    assert sensitive(model_with(3)) == expected(3)


def test_a_bias_a_cache_and_repeated_heads_change_nothing() -> None:
    values = """
        vp{i} = MatMul (x{i}, v_proj{i})
        vb{i} = Add (vp{i}, bias)
        size{i} = Shape (vb{i})
        vu{i} = Unsqueeze (vb{i}, one)
        ve{i} = Expand (vu{i}, size{i})
        vs{i} = Squeeze (ve{i}, one)
        v{i} = Concat <axis = 1> (vs{i}, past)
    """
    extra = {"bias": weights(9, WIDTH), "past": weights(8, 1, 0, WIDTH), "one": weights(0, 1).astype("int64") * 0 + 1}
    assert sensitive(model_with(2, extra, values=values)) == expected(2)


def test_what_happens_between_softmax_and_values_changes_nothing() -> None:
    weighed = """
        lost{i} = IsNaN (p{i})
        kept{i} = Where (lost{i}, zero, p{i})
        half{i} = Cast <to = 10> (kept{i})
        whole{i} = Cast <to = 1> (half{i})
        cc{i} = MatMul (whole{i}, v{i})
        ct{i} = Transpose <perm = [0, 1, 2]> (cc{i})
        c{i} = Identity (ct{i})
    """
    assert sensitive(model_with(2, {"zero": weights(0, 1) * 0}, weighed=weighed)) == expected(2)


def test_a_projection_that_makes_queries_too_is_not_one_of_values() -> None:
    text = """agraph (float[1, s, 32] x, float[1, s, s] p) => (float[1, s, 16] c, float[1, s, 16] used) {
        both = MatMul (x, v_proj)
        v, other = Split <axis = 2, num_outputs = 2> (both)
        used = Mul (other, other)
        q = Softmax (p)
        c = MatMul (q, v)
    }"""
    assert sensitive(model_of(proto(text, v_proj=weights(1, 32, 32)))) == {"v_proj": ["first_block"]}


def test_fused_operators_are_known() -> None:
    text = """agraph (float[1, s, 32] x) => (float[1, s, 32] y) {
        q = MatMul (x, q_proj)
        k = MatMul (x, k_proj)
        v = MatMul (x, v_proj)
        c = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v)
        y0 = MatMul (c, o_proj)
        y = Relu (y0)
    }"""
    source = proto(
        text,
        imports=', "com.microsoft" : 1',
        **{name: weights(i, 32, 32) for i, name in enumerate(("q_proj", "k_proj", "v_proj", "o_proj"))},
    )
    found = sensitive(model_of(source))
    assert found["v_proj"] == ["first_block", "value"]
    assert found["q_proj"] == ["first_block"]


def test_a_model_without_attention_has_none() -> None:
    text = "agraph (float[m, 32] x) => (float[m, 32] y) { a = MatMul (x, V)\n b = Relu (a)\n y = MatMul (b, W) }"
    assert sensitive(model_of(proto(text, V=weights(1, 32, 32), W=weights(2, 32, 32)))) == {}


@pytest.mark.parametrize(
    ("options", "wide"),
    [
        ({}, {"q_proj0", "k_proj0", "v_proj0", "o_proj0", "up_proj0", "down_proj0", "v_proj1", "o_proj1"}),
        ({"sensitive": ("value",)}, {"v_proj0", "v_proj1"}),
        ({"sensitive": ()}, set()),
        ({"sensitive_bits": 4}, set()),
        (
            {"bits": 8},
            {f"{n}{i}" for i in range(2) for n in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")},
        ),
    ],
)
def test_options_choose_who_gets_more_bits(options: dict[str, Any], wide: set[str]) -> None:
    change = QuantizeWeights(min_elements=0, **options).apply(model_with(2), Context())
    assert {entry["name"] for entry in change.detail["tensors"] if entry["bits"] == 8} == wide


def test_zero_bits_leave_them_alone() -> None:
    change = QuantizeWeights(min_elements=0, sensitive_bits=0, sensitive=("value",)).apply(model_with(2), Context())
    assert {skip.where for skip in change.skipped} == {"v_proj0", "v_proj1"}


def test_attentions_of_the_concept_are_known() -> None:
    model = model_with(3)
    assert len(FuseAttention().apply(model, Context()).sites) == 3
    assert sensitive(model) == expected(3)


def test_products_of_the_sample_stay_what_they_are_when_attention_is_fused() -> None:
    path = Path(__file__).resolve().parents[3] / "models" / "stdlib-llama" / "model.onnx"
    found = []
    for pipeline in ("cleanup", "cleanup, fuse_attention, cleanup"):
        model = open_model(path)
        Pipeline(pipeline).run(model)
        found.append(sensitive(model))
    assert found[0] == found[1]
    assert {"value", "output", "first_block"} == {way for ways in found[0].values() for way in ways}
