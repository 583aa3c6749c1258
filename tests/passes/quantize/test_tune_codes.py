"""`tune_codes`: other numbers in the same format, taken only where held-out text says that they are better."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser

from onnxslim_llm.concepts.block_weights import BLOCK_MATMUL, job_of
from onnxslim_llm.custom_ops.layout import BlockSpec, Layout, TileBuffers
from onnxslim_llm.custom_ops.packing import unpack
from onnxslim_llm.errors import UsageError
from onnxslim_llm.gradients.tuner import LogitTuner
from onnxslim_llm.gradients.tuning import Codes
from onnxslim_llm.ir.model import Model, from_proto
from onnxslim_llm.passes.quantize.codes.job import QuantizeJob
from onnxslim_llm.passes.quantize.codes.tuned_job import TunedJob, codes_of
from onnxslim_llm.passes.quantize.quantize_weights import QuantizeWeights
from onnxslim_llm.passes.quantize.tune_codes import TuneCodes
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Change
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.stats.calibration import TokenCalibration

VOCAB, K, N = 48, 32, 64
QUANTIZER = QuantizeWeights(bits=2, block=16, embedding_bits=8, lm_head_bits=4, sensitive=(), min_elements=0)
QUICK: dict[str, Any] = {"steps": 24, "batch": 2, "window": 32, "code_rate": 0.02, "scale_rate": 0.005}

DECODER = f"""<ir_version: 13, opset_import: ["" : 25]>
agraph (int64[b, s] input_ids) => (float[b, s, {VOCAB}] logits) {{
    x = Gather (E, input_ids)
    a = MatMul (x, W)
    t = Tanh (a)
    logits = MatMul (t, V)
}}"""


def source() -> onnx.ModelProto:
    proto, rng = parser.parse_model(DECODER), np.random.default_rng(0)
    for name, shape in {"E": (VOCAB, K), "W": (K, N), "V": (N, VOCAB)}.items():
        array = (rng.normal(size=shape) * 0.4).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


def context_of(folder: Path) -> Context:
    onnx.save(source(), folder / "source.onnx")
    tokens = np.random.default_rng(1).integers(0, VOCAB, 2048)
    data = TokenCalibration(tokens, 64, lambda ids: {"input_ids": ids})
    return Context(tuner=LogitTuner(folder / "source.onnx", lambda: data))


def tuned(folder: Path, **options: Any) -> tuple[Model, Change]:
    pytest.importorskip("torch")
    model, context = from_proto(source()), context_of(folder)
    Pipeline([QUANTIZER]).run(model, context)
    return model, TuneCodes(**{**QUICK, **options}).apply(model, context)


def test_the_format_stays_and_the_numbers_change(tmp_path: Path) -> None:
    plain = from_proto(source())
    Pipeline([QUANTIZER]).run(plain, Context())
    model, change = tuned(tmp_path)
    assert change.sites == ["E", "W", "V"]
    assert change.detail["kl_after"] < change.detail["kl_before"]
    before, after = plain.to_proto("inline").graph.initializer, model.to_proto("inline").graph.initializer
    assert [(t.name, t.data_type, list(t.dims), len(t.raw_data)) for t in before] == [
        (t.name, t.data_type, list(t.dims), len(t.raw_data)) for t in after
    ]
    changed = {old.name for old, new in zip(before, after, strict=True) if old.raw_data != new.raw_data}
    assert {"W_q2", "W_scale", "V_q4", "V_scale"} <= changed
    assert "E_q8" not in changed, "codes of 8 bits stay"


def test_the_same_bytes_twice(tmp_path: Path) -> None:
    first, second = (tuned(tmp_path)[0].to_proto("inline").SerializeToString() for _ in range(2))
    assert first == second


def test_without_a_better_answer_everything_stays(tmp_path: Path) -> None:
    model, change = tuned(tmp_path, code_rate=0.0, scale_rate=0.0)
    assert not change.sites
    assert [skip.reason for skip in change.skipped] == ["the held-out text got no better"]
    assert all(type(job_of(n)) is QuantizeJob for n in model.graph.nodes if BLOCK_MATMUL.is_call(n))


def test_large_models_are_left_alone(tmp_path: Path) -> None:
    _, change = tuned(tmp_path, max_parameters=1000)
    assert {skip.reason for skip in change.skipped} == {
        f"{VOCAB * K + K * N + N * VOCAB} coded weights, more than max_parameters = 1000"
    }


def test_codes_that_are_stored_already_are_left_alone(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    model = from_proto(source())
    Pipeline([QUANTIZER]).run(model, Context())
    stored = from_proto(model.to_proto("inline"))
    change = TuneCodes(**QUICK).apply(stored, context_of(tmp_path))
    assert {skip.reason for skip in change.skipped} == {"its codes are no recorded work of one weight"}


def test_it_needs_data() -> None:
    with pytest.raises(UsageError, match="there are none"):
        TuneCodes().requires(from_proto(source()), Context())


@pytest.mark.parametrize("options", [{"steps": 0}, {"code_rate": 0.7}, {"replaced": -0.1}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        TuneCodes(**options)


def test_without_torch(tmp_path: Path) -> None:
    script = """
import sys
sys.modules["torch"] = None
from onnxslim_llm.errors import ResourceError
from onnxslim_llm.passes.quantize.tune_codes import TuneCodes
from onnxslim_llm.rewrite.context import Context
try:
    TuneCodes().requires(None, Context(tuner=object()))
except ResourceError as error:
    print(error)
    raise SystemExit(error.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    assert "onnxslim-llm[gradients]" in done.stdout


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block"), [(2, 32), (3, 16), (4, 0), (8, 32)])
def test_every_layout_holds_the_same_numbers(bits: int, block: int, symmetric: bool) -> None:
    quantizer = QuantizeWeights(bits=bits, block=block, symmetric=symmetric, lm_head_bits=bits, min_elements=0)
    model = from_proto(source())
    Pipeline([quantizer]).run(model, Context())
    job = next(job for n in model.graph.nodes if BLOCK_MATMUL.is_call(n) and (job := job_of(n)) is not None)
    assert isinstance(job, QuantizeJob)
    first = codes_of(job)
    moved = ((first.codes.astype(np.int64) + 1) % (1 << bits)).astype(np.uint8)
    other = Codes(moved, first.scales * np.float32(0.5), first.zeros)
    made = TunedJob.of(job, other)
    _check(codes_of(made), other)
    if block:
        stored = made.with_layout("nbits")
        spec = BlockSpec(job.scheme.bits, job.scheme.block, symmetric, job.scheme.scale_type)
        held = TileBuffers.allocate(spec, Layout.NBITS, job.rows, job.columns)
        for buffer, raw in zip((held.codes, held.scales, held.zero_points), stored.compute(), strict=False):
            assert buffer is not None
            buffer.reshape(-1).view(np.uint8)[:] = raw
        codes, scales, zeros = unpack(held)
        _check(Codes(codes, scales, zeros), other)


def _check(found: Codes, wanted: Codes) -> None:
    assert np.array_equal(found.codes, wanted.codes)
    assert np.array_equal(found.scales, wanted.scales)
    assert np.array_equal(found.zeros, wanted.zeros)
