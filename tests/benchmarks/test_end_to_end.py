"""The end-to-end benchmark's own arithmetic; its contestants are measured by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from gguf_decoder import random_q4_0, tensors, write_gguf
from operators import by_operator
from reference_decoder import DecoderSpec, parameters
from summary import Result, table

RESULT = Result(
    shape="tiny",
    threads=1,
    name="ort-cpu-ops",
    load_seconds=0.01,
    load_anonymous=2_000_000,
    anonymous=40_000_000,
    prefill_seconds=0.5,
    prefill_tokens=256,
    step_seconds=0.05,
    best_prefill_seconds=0.4,
    best_step_seconds=0.04,
)
SPEC = DecoderSpec(vocab=64, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=96)


def test_random_weights_have_the_standard_deviation_that_was_asked_for() -> None:
    blocks = random_q4_0(64, 256, 0.02, seed=1).reshape(64, 8, 18)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
    codes = np.stack([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1).reshape(64, 8, 32).astype(np.float32) - 8
    assert (codes * scales).std() == pytest.approx(0.02, rel=0.03)  # 16384 numbers, and scales of 0.8 to 1.2


@pytest.mark.parametrize("tied", ["no", "transpose"])
def test_gguf_has_the_matrices_of_the_reference_decoder(tied: str) -> None:
    spec = DecoderSpec(**{**SPEC.__dict__, "tied": tied})
    norms = (2 * spec.layers + 1) * spec.hidden
    assert sum(rows * columns for _, rows, columns, _ in tensors(spec)) + norms == parameters(spec)


def test_gguf_is_written_in_q4_0(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(write_gguf(SPEC, tmp_path / "model.gguf"))
    found = {t.name: (t.tensor_type, math.prod(int(d) for d in t.shape)) for t in reader.tensors}
    assert found["blk.1.ffn_up.weight"] == (gguf.GGMLQuantizationType.Q4_0, 96 * 64)
    assert found["output_norm.weight"] == (gguf.GGMLQuantizationType.F32, 64)
    assert list(tmp_path.iterdir()) == [tmp_path / "model.gguf"]


def test_table_says_how_many_times_as_fast_ours_is() -> None:
    other = Result(**{**RESULT.__dict__, "name": "llama.cpp", "step_seconds": 0.06, "prefill_seconds": 2.0})
    lines = table([RESULT, other]).splitlines()
    assert lines[2] == "| tiny | 1 | ort-cpu-ops | 20.0 | 512 | 0.01 | 2 | 40 |"
    assert lines[3] == "| tiny | 1 | llama.cpp | 16.7 (x1.20) | 128 (x4.00) | 0.01 | 2 | 40 |"


def test_operators_are_those_of_the_fastest_run() -> None:
    def run(start: int, taken: int) -> dict[str, object]:
        return {"cat": "Session", "name": "model_run", "ts": start, "dur": taken}

    def node(name: str, kind: str, start: int, taken: int) -> dict[str, object]:
        event = {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": taken}
        return {**event, "args": {"op_name": kind}}

    events = [
        *(run(0, 90), node("a", "MatMul", 1, 60), node("logits", "MatMul", 70, 10)),
        *(run(100, 50), node("a", "MatMul", 101, 20), node("n", "Add", 122, 5), node("logits", "MatMul", 130, 10)),
    ]
    found = by_operator(events, 0, 2)
    assert found == {"all": 0.05, "MatMul": 0.02, "MatMul (logits)": 0.01, "Add": 0.005}
