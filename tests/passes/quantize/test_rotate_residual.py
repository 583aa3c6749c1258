"""`rotate_residual`: the rotated model computes the same, and outliers are gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from fusion_checks import run_all
from transformer_models import HEADS, KV_HEADS, SIZE, VOCAB, Habits, assert_same_logits, ids, statistics_of, transformer

from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import Model, open_model
from onnxslim_llm.ir.weights import constant, weight_of
from onnxslim_llm.passes.quantize.codes.trial import quickly_coded
from onnxslim_llm.passes.quantize.quantize_weights import QuantizeWeights
from onnxslim_llm.passes.quantize.rotate_residual import RotateResidual
from onnxslim_llm.passes.quantize.rotation.residual_stream import Stuck, find_residual_stream
from onnxslim_llm.passes.quantize.rotation.rotation_gain import relative_errors
from onnxslim_llm.recipe import Recipe
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.edit import Builder, redirect
from onnxslim_llm.rewrite.passes import Change
from onnxslim_llm.rewrite.pipeline import PassRecord, Pipeline
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.session import open_session

Array = np.ndarray[Any, Any]

#: What a rotation may change in a logit (of magnitude 20 or so): far below what quantizing changes.
LARGEST_DIFFERENCE = 1e-3

EVERY = [
    Habits(),
    Habits(bias=True),
    Habits(cache=True),
    Habits(tied=True),
    Habits(tied=True, uniform=True, bias=True),
    Habits(layer_norm=True),
    Habits(layer_norm=True, bias=True),
    Habits(layer_norm=True, bias=True, tied=True, cache=True),
]


def _rotated(model: Model, context: Context | None = None, **options: Any) -> Change:
    return RotateResidual(**{"only_if_better": False, **options}).apply(model, context or Context())


def _reason(model: Model, **options: Any) -> str:
    change = _rotated(model, heads=False, **options)
    assert not change
    return change.skipped[0].reason


# the same results


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("habits", EVERY)
def test_the_logits_stay(habits: Habits, heads: bool) -> None:
    before, after = transformer(habits), transformer(habits)
    change = _rotated(after, heads=heads)
    assert not change.skipped
    assert len(change.sites) == (3 if heads else 1)
    assert_same_logits(before, after, ids(habits))


@pytest.mark.parametrize("habits", [Habits(tied=True), Habits(tied=True, layer_norm=True, bias=True)])
def test_a_classifier_of_its_own(habits: Habits) -> None:
    before, after = transformer(habits), transformer(habits)
    assert _rotated(after, tied="untie").detail["tied"] == "untie"
    assert after.weight_bytes() - before.weight_bytes() >= VOCAB * SIZE * 4 - 11 * SIZE * 4  # weights of norms go
    assert after.census()["Transpose"] == 1
    assert_same_logits(before, after, ids(habits))


def test_a_tied_classifier_stays_tied_where_the_last_norm_is_uniform() -> None:
    model = transformer(Habits(tied=True, uniform=True))
    assert _rotated(model).detail["tied"] == "rotate"
    assert model.census()["MatMul"] == transformer(Habits(tied=True, uniform=True)).census()["MatMul"]


def test_two_products_where_it_is_not() -> None:
    before, after = transformer(Habits(tied=True)), transformer(Habits(tied=True))
    change = _rotated(after, heads=False)
    assert change.detail["tied"] == "multiply"
    assert after.census()["MatMul"] == before.census()["MatMul"] + 2
    tables = [weight_of(model.graph.tensors()["embedding"]).load() for model in (before, after)]
    assert np.array_equal(tables[0], tables[1])
    rotation = weight_of(after.graph.tensors()["embedding_rotation"]).load()
    assert np.allclose(np.abs(rotation), SIZE**-0.5)  # few bits hold it exactly


def test_only_norms_without_weight_are_left() -> None:
    model = transformer(Habits(layer_norm=True, bias=True))
    _rotated(model)
    census = model.census()
    assert "LayerNormalization" not in census
    assert census["onnxslim_llm::RMSNorm"] == 5
    norms = [node for node in model.graph.nodes if node.op == "RMSNorm"]
    assert all((weight_of(node.inputs[1]).load() == 1).all() for node in norms)
    assert len({id(node.inputs[1]) for node in norms}) == 1


def test_a_seed_makes_a_rotation() -> None:
    first, same, other = (transformer() for _ in range(3))
    _rotated(first, Context(seed=1))
    _rotated(same, Context(seed=1))
    _rotated(other, Context(seed=2))
    texts = [model.to_proto().SerializeToString(deterministic=True) for model in (first, same, other)]
    assert texts[0] == texts[1] != texts[2]


def test_names_of_weights_survive() -> None:
    before, after = transformer(), transformer()
    _rotated(after)
    kept = {tensor.name for tensor in before.constants()} & {tensor.name for tensor in after.constants()}
    assert {tensor.name for tensor in before.constants()} - kept == {
        f"{name}.weight" for name in ("norm", *(f"{i}.{kind}.norm" for i in (0, 1) for kind in ("attention", "mlp")))
    }


# what it is good for


def test_outliers_spread(tmp_path: Path) -> None:
    habits = Habits(outliers=True)
    model = transformer(habits)
    context = Context(statistics=statistics_of(model, habits, tmp_path / "a"))
    before = context.statistics.of_weight("0.gate").load().fit.mean_square
    _rotated(model, context)
    after = context.statistics.of_weight("0.gate").load().fit.mean_square
    assert before.max() / before.mean() > 10
    assert after.max() / after.mean() < 3


@pytest.mark.parametrize("habits", [Habits(), Habits(layer_norm=True, bias=True), Habits(tied=True)])
@pytest.mark.parametrize("tied", ["multiply", "untie"])
def test_statistics_are_those_of_the_rotated_model(habits: Habits, tied: str, tmp_path: Path) -> None:
    model = transformer(habits)
    context = Context(statistics=statistics_of(model, habits, tmp_path / "a"))
    _rotated(model, context, tied=tied)
    fresh = statistics_of(model, habits, tmp_path / "b")
    checked = 0
    for tap in fresh.taps:
        for weight in tap.weights:
            known = context.statistics.of_weight(weight)
            if known is None:
                assert weight == "embedding_rotation"  # looked up, not multiplied, before
                continue
            old, new = (stored.load().fit for stored in (known, fresh.of_weight(weight)))
            assert np.abs(old.gram - new.gram).max() < 1e-5 * np.abs(new.gram).max(), weight  # float32 activations
            assert np.abs(old.total - new.total).max() < 1e-5 * new.absolute.max(), weight
            checked += 1
    assert checked >= 15


# what is refused


def test_a_norm_that_writes_to_the_stream() -> None:
    assert "the result of a norm goes into the residual stream" in _reason(transformer(Habits(post_norm=True)))


def test_a_post_norm_encoder() -> None:
    model = transformer(Habits(layer_norm=True, bias=True))
    norm = next(node for node in model.graph.nodes if node.op == "LayerNormalization")
    add = next(node for node in norm.inputs[0].outputs if node.op == "Add")
    add.inputs[next(i for i, t in enumerate(add.inputs) if t is norm.inputs[0])] = norm.outputs[0]
    assert "norm" in _reason(model)


def test_a_tied_classifier_if_asked() -> None:
    reason = _reason(transformer(Habits(tied=True)), tied="leave")
    assert reason == "the classifier shares its weight with the embedding, and the norm before it has a weight"


def test_a_weight_that_is_used_twice() -> None:
    model = transformer()
    tensors = model.graph.tensors()
    redirect(tensors["1.down"], tensors["0.down"])
    assert "'0.down' is used elsewhere, too" in _reason(model)


def test_an_old_layer_norm() -> None:
    model = transformer(Habits(layer_norm=True))
    for graph in [*model.graphs(), *model.functions]:
        graph.opset = 17
    model.set_opset("", 17)
    assert "opset 18 is needed" in _reason(model)


def test_a_model_without_embeddings() -> None:
    model = transformer()
    gather = next(node for node in model.graph.nodes if node.op == "Gather")
    hidden = gs.Variable("hidden", np.float32, ["B", "S", SIZE])
    redirect(gather.outputs[0], hidden)
    model.graph.nodes.remove(gather)
    model.graph.inputs = [hidden]
    assert _reason(model) == "no table of token embeddings is looked up"


def test_a_stream_that_is_an_output() -> None:
    model = transformer()
    last = [node for node in model.graph.nodes if node.op == "Add"][-1].outputs[0]
    model.graph.outputs.append(last)
    assert _reason(model) == "the residual stream is an output of the model"


@pytest.mark.parametrize(
    ("op", "words"),
    [("Tanh", "Tanh writes to the residual stream"), ("Relu", "Relu writes to the residual stream")],
)
def test_something_that_is_not_linear_writes(op: str, words: str) -> None:
    model = transformer()
    down = next(node for node in model.graph.nodes if node.op == "MatMul" and node.inputs[1].name == "0.down")
    builder = Builder(model, "bent")
    output = down.outputs[0]
    down.outputs[0] = gs.Variable("straight", np.float32)
    getattr(builder, op)(down.outputs[0])
    builder.nodes[0].outputs[0] = output
    at = model.graph.nodes.index(down)
    model.graph.nodes[at + 1 : at + 1] = builder.nodes
    assert _reason(model) == words


def test_a_factor_by_channel_in_the_stream() -> None:
    model = transformer()
    down = next(node for node in model.graph.nodes if node.op == "MatMul" and node.inputs[1].name == "0.down")
    builder = Builder(model, "scaled")
    output = down.outputs[0]
    down.outputs[0] = gs.Variable("plain", np.float32)
    builder.Mul(down.outputs[0], np.linspace(1, 2, SIZE).astype(np.float32))
    builder.nodes[0].outputs[0] = output
    at = model.graph.nodes.index(down)
    model.graph.nodes[at + 1 : at + 1] = builder.nodes
    assert _reason(model) == "Mul writes to the residual stream"


def test_one_factor_in_the_stream_is_fine() -> None:
    before, after = transformer(), transformer()
    for model in (before, after):
        gather = next(node for node in model.graph.nodes if node.op == "Gather")
        builder = Builder(model, "scaled")
        output = gather.outputs[0]
        gather.outputs[0] = gs.Variable("plain", np.float32)
        builder.Mul(gather.outputs[0], np.float32(6.5))
        builder.nodes[0].outputs[0] = output
        model.graph.nodes[1:1] = builder.nodes
    assert _rotated(after)
    assert_same_logits(before, after, ids(Habits()))


def test_zeros_in_the_weight_of_a_norm() -> None:
    model = transformer()
    norm = next(node for node in model.graph.nodes if node.op == "RMSNorm")
    weight = weight_of(norm.inputs[1]).load()
    weight[5] = 0
    norm.inputs[1] = constant("zeros", weight)
    assert "has zeros" in _reason(model)


def test_norms_of_both_kinds() -> None:
    model = transformer(Habits(layer_norm=True))
    other = transformer()
    norm = next(node for node in model.graph.nodes if node.op == "LayerNormalization")
    model.functions[:] = [*model.functions, *(f for f in other.functions if f.name == "RMSNorm")]
    norm.op, norm.domain, norm.attrs = "RMSNorm", "onnxslim_llm", {"epsilon": 1e-5}
    norm.inputs.pop()
    assert _reason(model) == "some norms subtract the mean and others do not"


def test_another_reader_of_a_norm() -> None:
    model = transformer()
    norm = next(node for node in model.graph.nodes if node.op == "RMSNorm")
    builder = Builder(model, "watch")
    seen = builder.ReduceMax(norm.outputs[0], keepdims=0)
    seen.name, seen.dtype, seen.shape = "seen", np.dtype(np.float32), []
    model.graph.nodes += builder.nodes
    model.graph.outputs.append(seen)
    assert _reason(model) == "ReduceMax reads the result of a norm, not only products do"


def test_values_with_an_int8_cache() -> None:
    habits = Habits(cache=True)
    model = transformer(habits)
    ranges = {f"present.{layer}.value": np.ones((KV_HEADS, SIZE // HEADS)) for layer in (0, 1)}
    change = _rotated(model, Context(cache_ranges=ranges))
    assert change.sites == ["residual stream"]
    assert {skip.reason for skip in change.skipped} == {
        "the ranges of an int8 cache were measured without the rotation"
    }
    assert_same_logits(transformer(habits), model, ids(habits))


def test_what_the_stream_is() -> None:
    stream = find_residual_stream(transformer(Habits(layer_norm=True, bias=True)))
    assert stream.size == SIZE
    assert {table.name for table in stream.tables} == {"embedding", "positions.weight"}
    assert {product.name for product in stream.writers} == {"0.o", "0.down", "1.o", "1.down"}
    assert len(stream.biases) == 4
    assert len(stream.norms) == 5
    assert stream.centred
    with pytest.raises(Stuck):
        find_residual_stream(transformer(Habits(post_norm=True)))


def test_options() -> None:
    with pytest.raises(UsageError, match="is not possible"):
        RotateResidual(tied="both")  # type: ignore[arg-type]


# whether it is done


QUANTIZER = QuantizeWeights(bits=3, block=16, min_elements=0, sensitive=(), method="rtn", lm_head_bits=3)


def _judged(habits: Habits, folder: Path, **options: Any) -> tuple[Model, Context, PassRecord]:
    model = transformer(habits)
    context = Context(statistics=statistics_of(model, habits, folder))
    records = Pipeline([RotateResidual(**options), QUANTIZER]).run(model, context)
    return model, context, records[0]


def test_large_weights_are_worth_a_rotation(tmp_path: Path) -> None:
    """Blocks of 16 have a large weight every other time; large activations alone are not: AWQ makes use of them."""
    _, _, record = _judged(Habits(heavy=True), tmp_path)
    assert record.changed
    assert record.detail["error_ratio"] < 0.9
    assert record.nodes[0] == record.nodes[1]


def test_what_does_not_gain_is_left(tmp_path: Path) -> None:
    habits = Habits(outliers=True)
    model = transformer(habits)
    spread = Context(statistics=statistics_of(model, habits, tmp_path))
    _rotated(model, spread)
    weights = {tensor.name: weight_of(tensor).digest() for tensor in model.constants()}
    statistics = spread.statistics
    spread.following = (QUANTIZER,)
    change = RotateResidual().apply(model, spread)  # it is rotated already
    assert "residual stream" not in change.sites
    assert change.skipped[0].where == "residual stream"
    assert "on samples that were held out the error becomes" in change.skipped[0].reason
    touched = {name for name in weights if weight_of(model.graph.tensors()[name]).digest() != weights[name]}
    assert touched <= {"0.v", "1.v", "0.o", "1.o"}  # heads are judged by themselves
    assert (spread.statistics is statistics) == (not change.sites)


def test_predicted_errors_are_those_of_the_quantized_weights(tmp_path: Path) -> None:
    habits = Habits()
    model = transformer(habits)
    context = Context(statistics=statistics_of(model, habits, tmp_path))
    schemes = {name: scheme for name, scheme in QUANTIZER.plan(model, context).items() if name == "0.down"}
    weight = weight_of(model.graph.tensors()["0.down"]).load()
    held = context.statistics.of_weight("0.down").load().held.gram
    coded = quickly_coded(np.ascontiguousarray(weight.T), schemes["0.down"], np.ones(len(weight))).T
    error = np.trace((weight - coded).T @ held @ (weight - coded)) / np.trace(weight.T @ held @ weight)
    assert relative_errors(model, context, schemes) == pytest.approx(error, rel=1e-4)


def test_it_needs_data_and_a_quantizer_to_judge(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there are none"):
        Pipeline([RotateResidual(), QUANTIZER]).run(transformer(), Context())
    statistics = statistics_of(transformer(), Habits(), tmp_path)
    with pytest.raises(UsageError, match="no quantize_weights follows"):
        Pipeline([RotateResidual()]).run(transformer(), Context(statistics=statistics))
    assert Pipeline([RotateResidual(only_if_better=False)]).run(transformer(), Context())[0].changed == 3


@pytest.mark.parametrize(("method", "done"), [("rtn", False), ("hqq", False), ("search", True), ("calibrated", True)])
def test_few_bits_have_to_hold_the_added_products(method: Any, done: bool, tmp_path: Path) -> None:
    habits = Habits(tied=True)
    model = transformer(habits)
    quantizer = QuantizeWeights(bits=4, block=16, min_elements=0, sensitive=(), method=method)
    context = Context(statistics=statistics_of(model, habits, tmp_path), following=(quantizer,))
    change = RotateResidual(only_if_better=False, heads=False).apply(model, context)
    assert bool(change) == done
    assert [skip.reason for skip in change.skipped] == (
        [] if done else ["quantize_weights would round the added products by the rotation itself"]
    )


def test_the_sample_model_keeps_its_logits(sample_dir: Path) -> None:
    model = open_model(sample_dir / "model.onnx")
    Pipeline(Recipe.load("safe").build()).run(model)
    change = _rotated(model)
    assert change.detail["tied"] == "multiply"
    assert len(change.sites) == 6
    tokens = np.random.default_rng(0).integers(0, 2048, (2, 33))
    feeds = DecoderRunner(open_session(sample_dir / "model.onnx", threads=1)).arrays(tokens)
    logits = [run_all(proto, feeds)["logits"] for proto in (onnx.load(sample_dir / "model.onnx"), model.to_proto())]
    assert np.abs(logits[0]).max() > 5
    assert np.abs(logits[0] - logits[1]).max() < LARGEST_DIFFERENCE
