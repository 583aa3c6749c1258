"""`correct_biases`: the mean error of few-bit products goes into their biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fusion_checks import run_all
from transformer_models import Habits, ids, statistics_of, transformer

from onnxslim_llm.concepts.block_weights import BLOCK_MATMUL, job_of
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.ir.weights.jobs import derive
from onnxslim_llm.passes.quantize.bias_job import shift_of
from onnxslim_llm.passes.quantize.correct_biases import CorrectBiases
from onnxslim_llm.passes.quantize.quantize_weights import QuantizeWeights
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Change
from onnxslim_llm.rewrite.pipeline import Pipeline
from onnxslim_llm.stats.moments import Moments

Array = np.ndarray[Any, Any]

QUANTIZER = QuantizeWeights(bits=3, block=16, min_elements=0, sensitive=(), method="rtn", lm_head_bits=3)


def _quantized(habits: Habits, folder: Path, quantizer: QuantizeWeights = QUANTIZER) -> tuple[Model, Model, Context]:
    source, model = transformer(habits), transformer(habits)
    context = Context(statistics=statistics_of(source, habits, folder))
    Pipeline([quantizer]).run(model, context)
    return source, model, context


def _corrected(model: Model, context: Context, **options: Any) -> Change:
    return CorrectBiases(**options).apply(model, context)


def _dequantized(model: Model) -> dict[str, Array]:
    found = {}
    for node in model.graph.nodes:
        if BLOCK_MATMUL.is_call(node):
            job = job_of(node)
            assert job is not None
            codes, scales, zeros = (weight.load().astype(np.float64) for weight in derive(job))
            scales, zeros = (np.repeat(a, job.stored_block, axis=0)[: job.rows] for a in (scales, zeros))
            found[job.where()] = (codes - zeros) * scales
    return found


@pytest.mark.parametrize("method", ["rtn", "search", "calibrated"])
def test_biases_take_the_mean_error(method: Any, tmp_path: Path) -> None:
    habits = Habits(bias=True)
    quantizer = QuantizeWeights(bits=3, block=16, min_elements=0, sensitive=(), method=method)
    source, model, context = _quantized(habits, tmp_path, quantizer)
    weights = _dequantized(model)
    assert len(_corrected(model, context).sites) == 14
    before, after = source.graph.tensors(), model.graph.tensors()
    shifted = 0
    for name, coded in weights.items():
        if f"{name}.bias" not in before:
            continue  # the classifier
        collected = context.statistics.of_weight(name).load()
        error = weight_of(before[name]).load() - coded
        shift = collected.fit.mean @ error
        held = collected.held
        old = np.einsum("kn,kl,ln->n", error, held.gram, error)
        new = old - 2 * shift * (held.total @ error) + held.count * shift**2
        expected = np.where(new < old, shift, 0)
        found = weight_of(after[f"{name}.bias"]).load() - weight_of(before[f"{name}.bias"]).load()
        assert np.abs(found - expected).max() < 1e-5  # float32 biases around one
        shifted += np.count_nonzero(expected)
    assert shifted > 100


def test_the_model_comes_nearer(tmp_path: Path) -> None:
    """One product: what is corrected is its own error."""
    habits = Habits(bias=True)
    source, model, context = _quantized(habits, tmp_path)
    feeds = [ids(habits, seed=seed) for seed in range(100, 108)]
    name = next(n.outputs[0].name for n in source.graph.nodes if n.op == "MatMul" and n.inputs[1].name == "0.gate")
    biased = next(n.outputs[0].name for n in source.graph.nodes if n.op == "Add" and n.inputs[0].name == name)
    for each in (source, model):
        tensor = each.graph.tensors()[biased]
        tensor.shape, tensor.dtype = ["B", "S", tensor.shape[-1] if tensor.shape else 80], np.dtype(np.float32)
        each.graph.outputs = [tensor]
        keep = next(i for i, n in enumerate(each.graph.nodes) if n.outputs[0] is tensor)
        each.graph.nodes[:] = each.graph.nodes[: keep + 1]
    exact = [run_all(source.to_proto(), f)[biased] for f in feeds]
    plain = [run_all(model.to_proto(), f)[biased] for f in feeds]
    _corrected(model, context)
    after = [run_all(model.to_proto(), f)[biased] for f in feeds]
    errors = [np.square(np.array(outputs) - np.array(exact)).mean() for outputs in (plain, after)]
    assert errors[1] < errors[0]


def test_no_bias_is_added_unasked(tmp_path: Path) -> None:
    _, model, context = _quantized(Habits(), tmp_path)
    nodes = len(model.graph.nodes)
    change = _corrected(model, context)
    assert not change
    assert {skip.reason for skip in change.skipped} == {"it has no bias, and `add` is off"}
    assert len(model.graph.nodes) == nodes


def test_biases_are_added_where_they_pay(tmp_path: Path) -> None:
    habits = Habits()
    source, model, context = _quantized(habits, tmp_path)
    nodes = len(model.graph.nodes)
    change = _corrected(model, context, add=True, min_gain=0.02)
    assert 0 < len(change.sites) < 15
    assert len(model.graph.nodes) == nodes + len(change.sites)
    assert all("a bias would take" in skip.reason for skip in change.skipped)
    onnx.checker.check_model(model.to_proto())
    logits = [run_all(m.to_proto(), ids(habits))["logits"] for m in (source, model)]
    assert np.isfinite(logits[1]).all()
    assert logits[0].shape == logits[1].shape


def test_a_shared_bias_is_copied(tmp_path: Path) -> None:
    habits = Habits(bias=True)
    _, model, context = _quantized(habits, tmp_path)
    adds = [n for n in model.graph.nodes if n.op == "Add" and n.inputs[1].name in ("0.k.bias", "0.v.bias")]
    shared = adds[0].inputs[1]
    adds[1].inputs[1] = shared
    _corrected(model, context)
    assert adds[0].inputs[1] is not adds[1].inputs[1]
    values = [weight_of(add.inputs[1]).load() for add in adds]
    assert not np.array_equal(values[0], values[1])


def test_planes_are_left(tmp_path: Path) -> None:
    quantizer = QuantizeWeights(bits=5, block=16, min_elements=0, sensitive=(), method="search")
    _, model, context = _quantized(Habits(bias=True), tmp_path, quantizer)
    change = _corrected(model, context)
    assert "its codes are no recorded work of one weight" in {skip.reason for skip in change.skipped}


def test_a_shift_never_makes_the_held_out_error_larger() -> None:
    rng = np.random.default_rng(0)
    fit, held = Moments(12), Moments(12)
    fit.add(rng.standard_normal((40, 12)) + 0.3)
    rows = rng.standard_normal((30, 12)) + 0.1
    held.add(rows)
    error = rng.standard_normal((12, 200)).astype(np.float32)
    shift, gain = shift_of(error, fit, held)
    plain = np.square(rows @ error).sum(axis=0)
    moved = np.square(rows @ error - shift).sum(axis=0)
    assert np.allclose(plain - moved, gain, atol=1e-3)  # float32 rows
    assert (gain >= 0).all()
    assert 0 < np.count_nonzero(shift) < 200


def test_it_needs_data() -> None:
    with pytest.raises(UsageError, match="there are none"):
        Pipeline([CorrectBiases()]).run(transformer(), Context())
