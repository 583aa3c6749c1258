"""The precision of each product follows from what rounding does to its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from block_models import Array, model_of, product, proto, weights
from onnx import numpy_helper

from onnxslim_llm.custom_ops import packed
from onnxslim_llm.custom_ops.matmul_reference import Accuracy, matmul
from onnxslim_llm.custom_ops.packed import PackedScheme
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.save import save_model
from onnxslim_llm.passes.lower.weights.activation_rounding import LARGEST_ERROR
from onnxslim_llm.passes.lower.weights.lower_ort_cpu import LowerOrtCpu
from onnxslim_llm.passes.lower.weights.lower_ort_cpu_ops import LowerOrtCpuOps
from onnxslim_llm.passes.lower.weights.lower_portable import LowerPortable
from onnxslim_llm.passes.quantize.quantize_weights import QuantizeWeights
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Pass
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.runtime.session import open_session
from onnxslim_llm.stats.moments import Moments
from onnxslim_llm.stats.statistics import Statistics
from onnxslim_llm.stats.taps import Tap

K, N, ROWS = 256, 96, 512
#: Rows are drawn channel by channel and 64 columns are looked at; see the module's docstring.
CLOSENESS = 1 / 3


def rows_with_outliers() -> Array:
    """One channel of each block of 32 is 200 times as large as the others."""
    rows = weights(1, ROWS, K)
    rows[:, ::32] *= 200
    return rows


def deaf_to_outliers() -> Array:
    """A weight that hardly listens to these channels, as trained ones do: what is left is the others' rounding."""
    weight = weights(2, K, N)
    weight[::32] *= 1e-3
    return weight


def statistics_of(rows: Array, folder: Path) -> Statistics:
    moments = Moments(rows.shape[1])
    moments.add(rows)
    statistics = Statistics(folder, "key")
    statistics.put(Tap("x", rows.shape[1], 0, ["W"]), moments, Moments(rows.shape[1]))
    return statistics


def lowered(step: Pass, weight: Array, statistics: Statistics | None, bits: int = 4, block: int = 32) -> Any:
    source = product(*weight.shape)
    source.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "W"))
    model = model_of(source)
    quantize = QuantizeWeights(min_elements=0, bits=bits, lm_head_bits=bits, block=block, symmetric=True)
    record = Pipeline([quantize, step]).run(model, Context(statistics=statistics))[1]
    (node,) = [n for n in model.graph.nodes if n.op in ("MatMulPacked", "MatMulNBits")]
    return node.attrs.get("accuracy", node.attrs.get("accuracy_level")), record.detail


def true_error(rows: Array, weight: Array) -> float:
    """Of int8 activations with a weight of 8 bits, so that codes matter little."""
    scheme = PackedScheme(K, N, bits=8, block=32, scale_dtype="float32")
    scales = np.abs(weight.T.reshape(N, -1, 32)).max(-1) / 127
    codes = np.rint(weight.T.reshape(N, -1, 32) / scales[:, :, None]) + 128
    table = packed.pack(scheme, codes.astype(np.uint8), scales.astype(np.float32), None)
    exact = matmul(rows, table, Accuracy.EXACT)
    return float(np.linalg.norm(matmul(rows, table, Accuracy.INT8) - exact) / np.linalg.norm(exact))


def test_int8_is_taken_where_nothing_speaks_against_it() -> None:
    for step in (LowerOrtCpuOps(), LowerOrtCpu()):
        chosen, detail = lowered(step, weights(2, K, N), None)
        assert chosen in ("int8", 4)
        assert detail["largest_error"] == LARGEST_ERROR
        (measured,) = detail["measured"]
        assert (measured["name"], measured["chosen"]) == ("W", chosen)
        assert 0.003 < measured["int8_error"] < 0.01  # 0.6 % is what theory says of a normal distribution
        assert measured["rows_like"] == "normal"


def test_a_product_that_loses_too_much_is_more_precise(tmp_path: Path) -> None:
    rows, weight = rows_with_outliers(), deaf_to_outliers()
    assert true_error(rows, weight) > 5 * LARGEST_ERROR
    statistics = statistics_of(rows, tmp_path)
    chosen, detail = lowered(LowerOrtCpuOps(), weight, statistics)
    assert chosen == "bf16"
    assert detail["accuracy"] == {"bf16": 1}
    assert detail["measured"][0]["rows_like"] == "calibration data"
    assert lowered(LowerOrtCpu(), weight, statistics)[0] == 1
    # Not without data: the weight alone does not tell.
    assert lowered(LowerOrtCpuOps(), weight, None)[0] == "int8"


NORMS = {
    "n = RMSNormalization (x, g)": 0,
    "n = LayerNormalization (x, g, b)": 0.5,
    "n, , , s = com.microsoft.SkipSimplifiedLayerNormalization (x, x, g)": 0,
}


@pytest.mark.parametrize("norm", list(NORMS))
def test_a_norm_says_how_large_its_channels_are(norm: str) -> None:
    """Without calibration data: some channels are scaled up, and the weight makes up for it."""
    scale = np.where(np.arange(K) % 32 == 0, np.float32(200), np.float32(1))
    constants = {"g": scale, "b": np.full(K, NORMS[norm], np.float32), "W": deaf_to_outliers()}
    text = f"agraph (float[m, {K}] x) => (float[m, {N}] y) {{ {norm} y = MatMul (n, W) }}"
    used = {name: value for name, value in constants.items() if name != "b" or ", b)" in norm}
    model = model_of(proto(text, 24, 10, ', "com.microsoft" : 1', **used))
    steps = "quantize_weights{min_elements=0, lm_head_bits=4}, lower_ort_cpu_ops"
    detail = Pipeline(steps).run(model, Context())[-1].detail
    (measured,) = detail["measured"]
    assert (measured["rows_like"], measured["chosen"]) == ("norm", "bf16")
    rows = weights(7, ROWS, K) * scale + np.float32(NORMS[norm])
    assert measured["int8_error"] == pytest.approx(true_error(rows, constants["W"]), rel=CLOSENESS)


@pytest.mark.parametrize("bits", [2, 8])
def test_widths_without_float_kernels_keep_level_4(tmp_path: Path, bits: int) -> None:
    chosen, detail = lowered(LowerOrtCpu(), deaf_to_outliers(), statistics_of(rows_with_outliers(), tmp_path), bits)
    assert chosen == 4
    assert detail["measured"][0]["why"] == f"{bits}-bit weights have no kernel in float32"


@pytest.mark.parametrize(
    ("accuracy", "bits", "packed_accuracy", "level"),
    [
        ("exact", 8, "exact", 1),
        ("exact", 4, "exact", 1),
        ("bf16", 4, "bf16", 1),
        ("bf16", 8, "bf16", 4),  # ONNX Runtime has no float kernel for 8 bits: only "exact" is worth the time
        ("int8", 8, "int8", 4),
    ],
)
def test_weights_can_say_how_precise_their_products_are(
    accuracy: Any, bits: int, packed_accuracy: str, level: int
) -> None:
    quantize = QuantizeWeights(min_elements=0, bits=bits, lm_head_bits=bits, accuracy=accuracy)
    for step, expected in ((LowerOrtCpuOps(), packed_accuracy), (LowerOrtCpu(), level)):
        model = model_of(product(K, N))
        Pipeline([quantize, step]).run(model, Context())
        (node,) = [n for n in model.graph.nodes if n.op in ("MatMulPacked", "MatMulNBits")]
        assert node.attrs.get("accuracy", node.attrs.get("accuracy_level")) == expected


def test_scopes_say_it_for_some_weights() -> None:
    quantize = QuantizeWeights(min_elements=0, lm_head_bits=4, scopes=({"match": "W", "accuracy": "exact"},))
    model = model_of(product(K, N))
    Pipeline([quantize, LowerOrtCpuOps()]).run(model, Context())
    assert [n.attrs["accuracy"] for n in model.graph.nodes if n.op == "MatMulPacked"] == ["exact"]


@pytest.mark.parametrize("accuracy", ["exact", "bf16", "auto"])
def test_a_standard_model_leaves_exact_products_to_the_session(accuracy: Any, tmp_path: Path) -> None:
    """With the session entry that the note names, results are those of the float weights that the codes stand for."""
    model, context = model_of(product(K, N)), Context()
    quantize = QuantizeWeights(min_elements=0, bits=8, lm_head_bits=8, accuracy=accuracy)
    Pipeline([quantize, LowerPortable()]).run(model, context)
    told = [note for note in context.notes if "session.disable_quant_qdq = 1" in note]
    assert len(told) == (accuracy == "exact")
    if not told:
        return
    save_model(model, tmp_path / "model.onnx")
    stored = numpy_helper.to_array(product(K, N).graph.initializer[0])
    rows = weights(1, 8, K)
    exact, rounded = (
        open_session(tmp_path / "model.onnx", threads=1, config=config).run({"x": rows})["y"]
        for config in ({"session.disable_quant_qdq": "1"}, {"session.qdq_matmulnbits_accuracy_level": "4"})
    )
    true = rows @ stored
    # Rounding of activations (0.6 %) is more than that of codes of 8 bits in blocks of 32 (0.4 %).
    assert np.linalg.norm(exact - true) < 0.75 * np.linalg.norm(rounded - true)


def heavy_tails(seed: int) -> Array:
    """What a gated feed-forward layer hands on: products of two, most of them small."""
    rows: Array = weights(seed, ROWS, K) * weights(seed + 1, ROWS, K) * np.exp(weights(seed + 2, ROWS, 1) / 2)
    return rows


@pytest.mark.parametrize(
    ("rows", "weight"),
    [
        (weights(3, ROWS, K), weights(4, K, N)),
        (weights(3, ROWS, K) * np.exp(weights(5, K)), weights(4, K, N)),
        (weights(3, ROWS, K) + 3 * weights(5, K), weights(4, K, N)),
        (heavy_tails(6), weights(4, K, N)),
        (rows_with_outliers(), deaf_to_outliers()),
        (weights(3, ROWS, 8) @ weights(5, 8, K), weights(4, K, N)),  # channels that go together
    ],
)
def test_the_measured_error_is_near_the_true_one(rows: Array, weight: Array, tmp_path: Path) -> None:
    rows = rows.astype(np.float32)
    _, detail = lowered(LowerOrtCpuOps(), weight, statistics_of(rows, tmp_path))
    assert detail["measured"][0]["int8_error"] == pytest.approx(true_error(rows, weight), rel=CLOSENESS)


def test_longer_blocks_lose_more() -> None:
    def error(step: Pass, block: int) -> float:
        found: float = lowered(step, weights(2, K, N), None, block=block)[1]["measured"][0]["int8_error"]
        return found

    assert error(LowerOrtCpu(), 32) < error(LowerOrtCpu(), 128)
    # Our kernels never round more than 32 values together.
    assert error(LowerOrtCpuOps(), 32) == error(LowerOrtCpuOps(), 128)


def test_the_limit_decides() -> None:
    weight = weights(2, K, N)
    assert lowered(LowerOrtCpuOps(largest_error=0.004), weight, None)[0] == "bf16"
    assert lowered(LowerOrtCpuOps(largest_error=0.0), weight, None)[0] == "exact"
    assert lowered(LowerOrtCpu(largest_error=0.0), weight, None)[0] == 1


def test_a_precision_that_is_asked_for_is_not_measured() -> None:
    for step, wanted in (
        (LowerOrtCpuOps(accuracy="exact"), "exact"),
        (LowerOrtCpuOps(accuracy="int8", largest_error=0.0), "int8"),
        (LowerOrtCpuOps(exact=("W",)), "exact"),
        (LowerOrtCpu(accuracy_level=1), 1),
        (LowerOrtCpu(accuracy_level=0), 0),
    ):
        chosen, detail = lowered(step, weights(2, K, N), None)
        assert chosen == wanted
        assert "measured" not in detail


@pytest.mark.parametrize("limit", [-0.1, 1.5, float("nan")])
def test_a_limit_must_be_a_share(limit: float) -> None:
    for kind in (LowerOrtCpuOps, LowerOrtCpu):
        with pytest.raises(UsageError, match=r"relative error of .* makes no sense"):
            kind(largest_error=limit)


def test_a_weight_of_zeros_or_one_that_is_never_reached_loses_nothing(tmp_path: Path) -> None:
    chosen, detail = lowered(LowerOrtCpuOps(), np.zeros((K, N), np.float32), None)
    assert (chosen, detail["measured"][0]["int8_error"]) == ("int8", 0)
    statistics = statistics_of(np.zeros((4, K), np.float32), tmp_path)
    assert lowered(LowerOrtCpuOps(), weights(2, K, N), statistics)[0] == "int8"
