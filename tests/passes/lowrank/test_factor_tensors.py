"""`factor_tensors` on stacked experts and convolutions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from block_models import Array, model_of, proto, run, skipped, weights

from onnxslim_llm.errors import UsageError
from onnxslim_llm.passes.lowrank.factor_tensors import FactorTensors
from onnxslim_llm.passes.lowrank.tensor_decomposition import cp_tensor
from onnxslim_llm.rewrite.pipeline import PassRecord, Pipeline

E, K, N = 4, 32, 24
EXPERTS = f"agraph (float[{E}, m, {K}] x) => (float[{E}, m, {N}] y) {{ y = MatMul (x, W) }}"
CONV = """
    agraph (float[1, 16, h, w] x) => (float[1, 20, a, c] y) {
        y = Conv <kernel_shape = [3, 3], pads = [1, 0, 1, 2], strides = [2, 1], dilations = [1, 2]> (x, W, b)
    }
"""
#: Factors are computed in float64 and stored in float32; sums of some hundred products.
TOLERANCE = 1e-4


def _low(*shape: int, rank: int = 3) -> Array:
    """A tensor that few outer products make."""
    rng = np.random.default_rng(1)
    return cp_tensor([rng.standard_normal((size, rank)) for size in shape]).astype(np.float32)


def _done(source: Any, step: FactorTensors) -> tuple[Any, PassRecord]:
    model = model_of(source)
    (record,) = Pipeline([step]).run(model)
    return model.to_proto(), record


@pytest.mark.parametrize("method", ["tucker", "cp"])
def test_experts_that_share_directions_stay_what_they_are(method: Any) -> None:
    source = proto(EXPERTS, W=_low(E, K, N))
    result, record = _done(source, FactorTensors(method, ratio=0.4, min_elements=1))
    x = weights(5, E, 7, K)
    wanted = run(source, {"x": x})
    assert np.allclose(run(result, {"x": x}), wanted, atol=TOLERANCE * np.abs(wanted).max())
    (entry,) = record.detail["tensors"]
    stored = sum(int(np.prod(t.dims)) for t in result.graph.initializer)
    assert stored == entry["parameters"][1] <= 0.4 * E * K * N


@pytest.mark.parametrize("method", ["tucker", "cp"])
def test_a_convolution_keeps_its_strides_pads_and_bias(method: Any) -> None:
    kernel = np.ascontiguousarray(_low(9, 16, 20).transpose(2, 1, 0)).reshape(20, 16, 3, 3)
    source = proto(CONV, W=kernel, b=weights(3, 20))
    result, record = _done(source, FactorTensors(method, ratio=0.5, min_elements=1))
    assert record.changed == 1
    x = weights(6, 1, 16, 11, 13)
    wanted = run(source, {"x": x})
    found = run(result, {"x": x})
    assert found.shape == wanted.shape
    assert np.allclose(found, wanted, atol=TOLERANCE * np.abs(wanted).max())


def test_one_dimension_of_places_will_do() -> None:
    text = "agraph (float[1, 16, t] x) => (float[1, 20, s] y) { y = Conv <kernel_shape = [5]> (x, W) }"
    kernel = np.ascontiguousarray(_low(5, 16, 20).transpose(2, 1, 0))
    source = proto(text, W=kernel)
    result, record = _done(source, FactorTensors(ratio=0.5, min_elements=1))
    assert record.changed == 1
    x = weights(6, 1, 16, 30)
    wanted = run(source, {"x": x})
    assert np.allclose(run(result, {"x": x}), wanted, atol=TOLERANCE * np.abs(wanted).max())


def test_what_is_left_says_why() -> None:
    text = """
        agraph (float[1, 16, h, w] x, float[m, 64] a, float[4, m, 32] e) =>
               (float[1, 16, p, q] u, float[1, 16, r, s] v, float[m, 64] b, float[4, m, 24] f, float[4, m, 24] g) {
            u = Conv (x, one)
            v = Conv <group = 4> (x, grouped)
            b = MatMul (a, matrix)
            f = MatMul (e, W)
            g = MatMul (e, W)
        }
    """
    source = proto(
        text,
        one=weights(0, 16, 16, 1, 1),
        grouped=weights(0, 16, 4, 3, 3),
        matrix=weights(0, 64, 64),
        W=weights(0, E, K, N),
    )
    _, record = _done(source, FactorTensors(min_elements=1))
    assert not record.changed
    assert skipped(record) == {
        "one": "its kernel has one place: it is a matrix",
        "grouped": "the convolution has 4 groups",
        "matrix": "it is a matrix: Tucker and CP are the singular value decomposition then",
        "W": "it is used elsewhere, too",
    }


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"min_elements": 10_000}, "3072 elements, fewer than min_elements = 10000"),
        ({"exclude": ("W",), "min_elements": 1}, "it is excluded by 'W'"),
        ({"ratio": 0.005, "min_elements": 1}, "no factors have only 0.005 of its parameters"),
    ],
)
def test_options_leave_weights_alone(options: dict[str, Any], reason: str) -> None:
    _, record = _done(proto(EXPERTS, W=_low(E, K, N)), FactorTensors(**options))
    assert skipped(record) == {"W": reason}


def test_cp_of_experts_needs_rows() -> None:
    text = f"agraph (float[{K}] x) => (float[{E}, {N}] y) {{ y = MatMul (x, W) }}"
    _, record = _done(proto(text, W=_low(E, K, N)), FactorTensors("cp", min_elements=1))
    assert skipped(record) == {"W": "the rank of the other operand is unknown"}


@pytest.mark.parametrize(("options", "said"), [({"ratio": 1.0}, "ratio = 1"), ({"align": 0}, "align = 0")])
def test_impossible_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        FactorTensors(**options)
