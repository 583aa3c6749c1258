"""Where factors by channel can be folded, and why not elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from block_models import model_of, proto, weights
from fusion_checks import run_all

from onnxslim_llm.passes.quantize.folding.fold_scales import fold_scales, tied
from onnxslim_llm.passes.quantize.folding.fold_sites import FoldSite, find_fold_sites
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Change

Array = np.ndarray[Any, Any]

#: Float32 products of 24 terms around one, scaled by factors up to 4 and back.
TOLERANCE = 1e-5

NORM = "n = LayerNormalization <axis = -1> (x, g, b)"
HEAD = "agraph (float[m, 24] x) => (float[m, 24] y)"


def _model(body: str, head: str = HEAD, **more: Array) -> onnx.ModelProto:
    given = {"W": weights(1, 24, 24), "V": weights(2, 24, 24), "g": weights(3, 24), "b": weights(4, 24), **more}
    used = {name: value for name, value in given.items() if name in body.replace(",", " ").replace(")", " ").split()}
    used |= {name: value for name, value in given.items() if f"({name}" in body}
    return proto(f"{head} {{ {body} }}", **used)


def _sites(source: onnx.ModelProto) -> tuple[list[FoldSite], list[str]]:
    change = Change()
    found = find_fold_sites(model_of(source), change)
    return found, [skip.reason for skip in change.skipped]


def _check_folding(source: onnx.ModelProto) -> None:
    model = model_of(source)
    rng = np.random.default_rng(0)
    sites = find_fold_sites(model, Change())
    assert sites
    for site in sites:
        fold_scales(model, Context(), site, tied(site, np.exp2(rng.uniform(-2, 2, len(site.channels)))))
    feeds = {"x": weights(9, 5, 24)}
    before, after = run_all(source, feeds)["y"], run_all(model.to_proto(), feeds)["y"]
    assert np.abs(before - after).max() <= TOLERANCE * np.abs(before).max()


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        (f"{NORM}\n y = MatMul (n, W)", ["norm"]),
        ("p = MatMul (x, W)\n y = MatMul (p, V)", ["product"]),
        ("p = MatMul (x, W)\n r = Relu (p)\n y = MatMul (r, V)", ["product"]),
        ("p = MatMul (x, W)\n q = Add (b, p)\n r = Relu (q)\n y = MatMul (r, V)", ["product"]),
        ("p = Gemm <transB = 1> (x, W, b)\n y = Gemm <alpha = 0.5> (p, V)", ["product"]),
        ("T = Transpose <perm = [1, 0]> (W)\n p = MatMul (x, T)\n i = Identity (p)\n y = MatMul (i, V)", ["product"]),
        ("p = MatMul (x, W)\n t = Tanh (x)\n m = Mul (p, t)\n y = MatMul (m, V)", ["product"]),
        ("p = MatMul (x, W)\n t = Tanh (x)\n m = Mul (t, p)\n y = MatMul (m, V)", ["product"]),
        (f"{NORM}\n p = MatMul (n, W)\n q = MatMul (n, V)\n y = Add (p, q)", ["norm"]),
    ],
)
def test_factors_fold(body: str, kinds: list[str]) -> None:
    source = _model(body)
    sites, _ = _sites(source)
    assert [site.kind for site in sites] == kinds
    _check_folding(source)


def test_a_norm_that_shares_its_weight_gets_its_own() -> None:
    twice = f"{NORM}\n o = LayerNormalization <axis = -1> (x, g, b)"
    _check_folding(_model(f"{twice}\n p = MatMul (n, W)\n q = MatMul (o, V)\n y = Add (p, q)"))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = MatMul (x, W)", "nothing in the model makes it"),
        (f"{NORM}\n p = MatMul (n, W)\n y = Add (p, n)", "Add 'y' reads it, too"),
        ("t = Tanh (x)\n y = MatMul (t, W)", "what makes it cannot take a factor by channel"),
        ("p = MatMul (x, W)\n t = Tanh (p)\n y = MatMul (t, V)", "what makes it cannot take a factor by channel"),
        ("p = MatMul (x, W)\n m = Mul (p, p)\n y = MatMul (m, V)", "what makes it cannot take a factor by channel"),
        (
            "p = MatMul (x, W)\n a = Sigmoid (p)\n m = Mul (p, a)\n y = MatMul (m, V)",
            "what makes it cannot take a factor by channel",
        ),
        ("p = MatMul (x, W)\n q = Add (p, x)\n y = MatMul (q, V)", "what makes it cannot take a factor by channel"),
        ("p = MatMul (x, W)\n q = MatMul (p, V)\n y = MatMul (q, V)", "'V' is used elsewhere, too"),
        (
            f"{NORM}\n c = Cast <to = 1> (W)\n p = MatMul (n, c)\n q = MatMul (x, W)\n y = Add (p, q)",
            "'W' is used elsewhere, too",
        ),
        (
            "n = LayerNormalization <axis = 0> (x, g2)\n y = MatMul (n, W)",
            "what makes it cannot take a factor by channel",
        ),
        ("p = MatMul (x, W)\n q = Add (p, s)\n y = MatMul (q, V)", "the bias of 'q' is no vector of 24 elements"),
    ],
)
def test_refusals(body: str, reason: str) -> None:
    head = HEAD.replace("m,", "5,") if "g2" in body else HEAD
    source = _model(body, head, g2=weights(3, 5, 24), s=weights(5, 1))
    _, reasons = _sites(source)
    assert reason in reasons


def test_an_input_that_is_an_output() -> None:
    head = "agraph (float[m, 24] x) => (float[m, 24] y, float[m, 24] n)"
    _, reasons = _sites(_model(f"{NORM}\n y = MatMul (n, W)", head))
    assert reasons == ["it is an output of the model"]


def test_a_maker_that_is_an_output() -> None:
    head = "agraph (float[m, 24] x) => (float[m, 24] y, float[m, 24] p)"
    _, reasons = _sites(_model("p = MatMul (x, W)\n r = Relu (p)\n y = MatMul (r, V)", head))
    assert "what makes it cannot take a factor by channel" in reasons
