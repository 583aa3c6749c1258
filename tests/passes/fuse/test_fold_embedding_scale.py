"""The factor of an embedding in its table: the same bits, and no second copy of a shared table."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from block_models import model_of, proto, run, skipped, weights

from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.save import SaveOptions, save_model
from onnxslim_llm.ir.weights import ArrayWeight
from onnxslim_llm.passes.fuse import fold_embedding_scale as module
from onnxslim_llm.rewrite.pipeline import PassRecord, Pipeline

V, D = 50, 24
TEXT = f"""
    agraph (int64[b, s] ids) => (float[b, s, {D}] y) {{
        e = Gather (E, ids)
        y = Mul (ORDER)
    }}
"""
FEEDS = {"ids": np.random.default_rng(1).integers(0, V, (2, 7))}
SCALE = np.array(D**0.5, np.float32)


def source(text: str = TEXT, **more: np.ndarray) -> onnx.ModelProto:
    made = {"E": weights(1, V, D), "c": SCALE, **more}
    text = text.replace("ORDER", "e, c")
    return proto(text, **{name: value for name, value in made.items() if f"{name}," in text or f"{name})" in text})


def folded(model: onnx.ModelProto) -> tuple[Model, PassRecord]:
    result = model_of(model)
    return result, Pipeline("fold_embedding_scale").run(result)[0]


def ops(model: Model) -> Counter[str]:
    return Counter(node.op for node in model.graph.nodes)


@pytest.mark.parametrize("order", ["e, c", "c, e"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_same_bits(order: str, shape: tuple[int, ...]) -> None:
    model = source(TEXT.replace("ORDER", order), c=SCALE.reshape(shape))
    result, record = folded(model)
    assert record.changed == 1
    assert ops(result) == {"Gather": 1}
    np.testing.assert_array_equal(run(result.to_proto(), FEEDS), run(model, FEEDS))


def test_half_precision() -> None:
    half = {"E": weights(1, V, D, dtype=np.float16), "c": SCALE.astype(np.float16)}
    model = source(TEXT.replace("float[", "float16["), **half)
    result, _ = folded(model)
    np.testing.assert_array_equal(run(result.to_proto(), FEEDS), run(model, FEEDS))


def test_saved_in_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TILE_BYTES", 7 * D * 4)
    model = source()
    result, _ = folded(model)
    save_model(result, tmp_path / "m.onnx", SaveOptions(jobs=2, external=True))
    (table,) = onnx.load(tmp_path / "m.onnx").graph.initializer
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(table), weights(1, V, D) * SCALE)


def test_another_factor_is_another_job() -> None:
    weight = ArrayWeight(weights(1, V, D))
    jobs = [module.ScaleJob(weight, np.array(f, np.float32), "E") for f in (2, 3)]
    assert jobs[0].key != jobs[1].key


@pytest.mark.parametrize(
    ("text", "more", "reason"),
    [
        (
            TEXT.replace("y = Mul (ORDER)", "t = Mul (ORDER)\n T = Transpose (E)\n y = MatMul (t, T)"),
            {},
            "stored twice",
        ),
        (TEXT, {"c": np.ones(D, np.float32)}, "no single number"),
        (TEXT, {"c": np.ones((1, 1, 1), np.float32)}, "no single number"),
        (TEXT.replace("y = Mul (ORDER)", "t = Mul (ORDER)\n y = Add (t, e)"), {}, "used elsewhere"),
        (TEXT.replace("(int64[b, s] ids)", f"(int64[b, s] ids, float[{V}, {D}] E)"), {}, ""),
    ],
    ids=["tied", "vector", "raises the rank", "looked-up rows are used", "a default that may be replaced"],
)
def test_left_alone(text: str, more: dict[str, np.ndarray], reason: str) -> None:
    if "MatMul" in text:
        text = text.replace(f"s, {D}] y", f"s, {V}] y")
    result, record = folded(source(text, **more))
    assert record.changed == 0
    assert reason in "; ".join(skipped(record).values())
    assert ops(result)["Mul"] == 1
