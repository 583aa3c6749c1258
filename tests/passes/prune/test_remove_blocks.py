"""`remove_blocks`: what is a block, that the model is whole without it, and what the fit before the gap makes good."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import transformer_models
from block_models import model_of, proto, weights
from fusion_checks import run_all
from transformer_models import Habits, assert_same_logits, ids, transformer

from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.ir.weights import ArrayWeight, weight_of
from onnxslim_llm.passes.prune import remove_blocks
from onnxslim_llm.passes.prune.remove_blocks import RemoveBlocks
from onnxslim_llm.products.blocks import find_blocks
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.edit import Builder, redirect
from onnxslim_llm.rewrite.passes import Change
from onnxslim_llm.rewrite.pipeline import PassRecord, Pipeline
from onnxslim_llm.runtime.session import Session
from onnxslim_llm.stats.calibration import Feeds
from onnxslim_llm.stats.observe import GraphObserver

EVERY = [
    Habits(),
    Habits(cache=True, bias=True),
    Habits(layer_norm=True, bias=True, tied=True, cache=True),
    Habits(post_norm=True, cache=True),
]


def observed(habits: Habits) -> Context:
    """What a compile gives passes to look at tensors with."""

    def feeds(session: Session) -> Iterator[Feeds]:
        yield from (ids(habits, 4, 12, seed) for seed in range(1, 17))

    return Context(observer=GraphObserver(feeds, threads=1))


def removed(model: Model, context: Context | None = None, **options: Any) -> tuple[Model, PassRecord]:
    after = model.copy()
    steps = [RemoveBlocks(**{"refit": False, **options})]
    return after, Pipeline(steps).run(after, context or Context())[0]


def inferred(model: Model) -> Model:
    infer_shapes(model)
    return model


def reasons(record: PassRecord) -> str:
    return "; ".join(skip.reason for skip in record.skipped)


def scaled(model: Model, layer: int, factor: float) -> None:
    """Let what a block adds be larger or smaller."""
    for constant in model.constants():
        writes = constant.name.startswith((f"{layer}.o", f"{layer}.down"))
        norm = constant.name in (f"{layer}.attention.post.weight", f"{layer}.mlp.post.weight")
        if writes or norm:
            constant.values = ArrayWeight(weight_of(constant).load() * np.float32(factor))


def without_caches(feeds: dict[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    names = [name for name in feeds if not name.startswith("past") or int(name.split(".")[1]) < layers]
    return {name: feeds[name] for name in names}


@pytest.mark.parametrize("habits", EVERY, ids=str)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_block_that_adds_nothing_goes_and_nothing_changes(habits: Habits, layer: int) -> None:
    model = transformer(habits)
    scaled(model, layer, 0.0)
    after, record = removed(model, blocks=(layer,))
    assert record.changed == 1
    feeds = ids(habits)
    expected = run_all(model.to_proto(), feeds)
    actual = run_all(after.to_proto(), without_caches(feeds, 1))
    np.testing.assert_array_equal(actual["logits"], expected["logits"])
    if habits.cache:  # the block that stays has the numbers of the first one
        np.testing.assert_array_equal(actual["present.0.key"], expected[f"present.{1 - layer}.key"])


def test_caches_are_numbered_from_0_on() -> None:
    habits = Habits(cache=True)
    model = transformer(habits)
    ranges = {f"present.{layer}.{part}": np.full((2, 12), layer) for layer in (0, 1) for part in ("key", "value")}
    context = Context(cache_ranges=ranges)
    after, record = removed(model, context, blocks=(0,))
    names = [t.name for t in (*after.graph.inputs, *after.graph.outputs) if "." in t.name]
    assert names == ["past.0.key", "past.0.value", "present.0.key", "present.0.value"]
    assert context.cache_ranges is not None
    assert {name: values.max() for name, values in context.cache_ranges.items()} == {
        "present.0.key": 1,
        "present.0.value": 1,
    }
    assert record.detail["config"] == {"num_hidden_layers": 1, "layers_gone": [0]}


def test_what_asks_for_the_length_of_a_lost_cache_asks_another() -> None:
    model = transformer(Habits(cache=True, layer_norm=True))
    positions = next(t for t in model.graph.inputs if t.name == "positions")
    past = next(t for t in model.graph.inputs if t.name == "past.0.key")
    op = Builder(model, "length")
    length = op.Gather(op.Shape(past), np.array([2]), axis=0)
    shifted = op.Add(positions, length)
    users = [node for node in positions.outputs if node.op == "Gather"]
    model.graph.nodes.extend(op.nodes)
    for node in users:
        node.inputs[1] = shifted
    after, record = removed(model, blocks=(0,))
    assert record.changed == 1, reasons(record)
    shape = next(node for node in after.graph.nodes if node.op == "Shape")
    assert shape.inputs[0].name == "past.0.key"
    feeds = without_caches(ids(Habits(cache=True, layer_norm=True)), 1)
    assert np.isfinite(run_all(after.to_proto(), feeds)["logits"]).all()


@pytest.mark.parametrize("small", [0, 1])
def test_the_block_that_changes_least_goes(small: int) -> None:
    habits = Habits(cache=True)
    model = transformer(habits)
    scaled(model, small, 0.05)
    _, record = removed(model, observed(habits))
    found = record.detail["blocks"]
    assert found["gone"] == [small]
    assert np.argmin(found["scores"]) == small
    assert 0 < found["scores"][small] < 0.05 < found["scores"][1 - small]


def test_the_score_is_one_minus_the_cosine() -> None:
    habits = Habits()
    model = transformer(habits)
    context = observed(habits)
    _, record = removed(model, context)
    block = find_blocks(inferred(model), Change())[1]
    probe = model.to_proto()
    names = (block.before.name, block.after.name)
    probe.graph.output.extend(type(probe.graph.output[0])(name=name) for name in names)
    cosines = []
    for seed in range(1, 17):
        found = run_all(probe, ids(habits, 4, 12, seed))
        before, after = (found[name].reshape(-1, found[name].shape[-1]).astype(np.float64) for name in names)
        lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
        cosines.append((before * after).sum(axis=1) / lengths)
    assert record.detail["blocks"]["scores"][1] == pytest.approx(1 - np.concatenate(cosines).mean(), abs=1e-5)


@pytest.mark.parametrize("habits", [Habits(cache=True), Habits(bias=True)], ids=str)
def test_the_fit_makes_good_for_what_is_missing(habits: Habits) -> None:
    model = transformer(habits)
    scaled(model, 1, 0.3)
    feeds = ids(habits, 8, 12, seed=77)
    expected = run_all(model.to_proto(), feeds)["logits"]
    errors = []
    for refit in (False, True):
        after, record = removed(model, observed(habits), blocks=(1,), refit=refit)
        assert len(record.detail["fitted"]) == refit
        logits = run_all(after.to_proto(), without_caches(feeds, 1))["logits"]
        errors.append(float(np.square(logits - expected).mean()))
    assert errors[1] < errors[0]


def test_without_a_product_before_the_gap_nothing_is_fitted() -> None:
    habits = Habits()
    model = transformer(habits)
    _, record = removed(model, observed(habits), blocks=(0,), refit=True)
    assert record.changed == 1
    assert record.detail["fitted"] == []
    assert "nothing is fitted in its place: no product writes right before it" in reasons(record)


@pytest.mark.parametrize("gone", [(0, 1), (1, 2), (0, 2)])
def test_blocks_side_by_side_and_apart(monkeypatch: pytest.MonkeyPatch, gone: tuple[int, ...]) -> None:
    monkeypatch.setattr(transformer_models, "LAYERS", 3)
    habits = Habits(cache=True)
    model = transformer(habits)
    for layer in gone:
        scaled(model, layer, 0.0)
    after, record = removed(model, blocks=gone)
    assert record.changed == 2
    feeds = ids(habits)
    expected = run_all(model.to_proto(), feeds)
    actual = run_all(after.to_proto(), without_caches(feeds, 1))
    np.testing.assert_array_equal(actual["logits"], expected["logits"])
    (left,) = {0, 1, 2} - set(gone)
    np.testing.assert_array_equal(actual["present.0.value"], expected[f"present.{left}.value"])


def test_a_block_that_cannot_go_between_two_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_models, "LAYERS", 4)
    model = inferred(transformer())
    inside = find_blocks(model, Change())[1].nodes[3].outputs[0]
    inside.dtype = np.dtype(np.float32)
    model.graph.outputs.append(inside)
    after, record = removed(model, blocks=(0, 1))  # the first and the third of the model
    assert f"'{inside.name}' is an output of the model" in reasons(record)
    assert record.detail["config"] == {"num_hidden_layers": 2, "layers_gone": [0, 2]}
    assert {c.name for c in after.constants() if c.name.endswith(".down")} == {"1.down", "3.down"}


def test_large_products_are_not_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remove_blocks, "LARGEST_FIT", 79)
    habits = Habits()
    _, record = removed(transformer(habits), observed(habits), blocks=(1,), refit=True)
    assert record.detail["fitted"] == []
    assert "nothing is fitted in its place: '0.down' has 80 rows, more than 79" in reasons(record)


# what is no block


def test_norms_in_the_residual_stream() -> None:
    model = transformer(Habits(layer_norm=True))
    for node in [n for n in model.graph.nodes if n.op == "Add" and n.inputs[1].inputs][1:-1]:
        op = Builder(model, "post")
        old = node.outputs[0]
        node.outputs[0] = gs.Variable(model.fresh_name("sum"), np.float32)
        result = op.LayerNormalization(node.outputs[0], op.constant(np.ones(48, np.float32)), axis=-1)
        redirect(old, result)
        model.graph.nodes.extend(op.nodes)
    _, record = removed(model, blocks=(0,))
    assert not record.changed
    assert "stands in the residual stream behind it" in reasons(record)


def test_what_is_not_added_up() -> None:
    model = transformer()
    sums = [node for node in model.graph.nodes if node.op == "Add" and node.inputs[0].inputs]
    sums[0].op = "Mul"
    change = Change()
    assert len(find_blocks(inferred(model), change)) == 1
    assert change.skipped[0].reason == "what follows its attention is not added to what was there before"


@pytest.mark.parametrize("tensor", ["result", "inside"])
def test_outputs_of_the_model_stay(tensor: str) -> None:
    model = transformer()
    block = find_blocks(inferred(model), Change())[0]
    found = block.after if tensor == "result" else block.nodes[3].outputs[0]
    found.dtype = np.dtype(np.float32)
    model.graph.outputs.append(found)
    change = Change()
    left = find_blocks(inferred(model), change)
    assert len(left) == 1
    assert f"'{found.name}' is an output of the model" in change.skipped[0].reason


def test_a_model_without_tokens() -> None:
    text = "agraph (float[m, 16] x) => (float[m, 16] y) { h = MatMul (x, W) y = Add (x, h) }"
    _, record = removed(model_of(proto(text, W=weights(0, 16, 16))), blocks=(0,))
    assert reasons(record) == "no table of token embeddings is looked up"


def test_one_block_stays() -> None:
    with pytest.raises(UsageError, match="2 of 2 blocks cannot go"):
        removed(transformer(), blocks=(0, 1))
    with pytest.raises(UsageError, match="there is no block 2 that could go"):
        removed(transformer(), blocks=(2,))
    habits = Habits()
    with pytest.raises(UsageError, match="5 of 2 blocks cannot go") as caught:
        removed(transformer(habits), observed(habits), count=5)
    assert caught.value.todo == "leave out 1 at most"


@pytest.mark.parametrize("options", [{"count": 0}, {"blocks": (1, 1)}, {"blocks": (-1,)}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        RemoveBlocks(**options)


def test_data_are_asked_for() -> None:
    with pytest.raises(UsageError, match="blocks are compared on calibration data"):
        removed(transformer())


def test_nothing_else_changes() -> None:
    model = transformer(Habits(cache=True))
    scaled(model, 1, 0.0)
    after, _ = removed(model, blocks=(1,))
    assert_same_logits(after, after.copy(), without_caches(ids(Habits(cache=True)), 1))
    names = {c.name for c in after.constants()}
    assert not [name for name in names if name.startswith("1.")]
    assert {"0.q", "0.k", "0.v", "0.o", "0.gate", "0.up", "0.down", "embedding", "head"} <= names
