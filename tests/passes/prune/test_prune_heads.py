"""`prune_heads`: which attentions have heads that can go, that all that counts heads follows, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from fusion_checks import run_all
from transformer_models import HEADS, KV_HEADS, SIZE, Habits, assert_same_logits, ids, statistics_of, transformer

from onnxslim_llm.concepts.attention import is_attention
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import Model, from_proto
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.ir.topology import sort_nodes
from onnxslim_llm.ir.weights import ArrayWeight, constant, weight_of
from onnxslim_llm.passes.cleanup.remove_dead_code import RemoveDeadCode
from onnxslim_llm.passes.prune.heads.head_scores import Ranking, leave_out, rank_groups
from onnxslim_llm.passes.prune.prune_heads import PruneHeads
from onnxslim_llm.passes.prune.rows.refit_rows_job import fitted_rows
from onnxslim_llm.passes.quantize.quantize_weights import QuantizeWeights
from onnxslim_llm.products.heads import find_head_layers
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.edit import Builder, redirect
from onnxslim_llm.rewrite.passes import Change
from onnxslim_llm.rewrite.pipeline import PassRecord, Pipeline

WIDTH = SIZE // HEADS
GROUP = HEADS // KV_HEADS * WIDTH
EVERY = [
    Habits(),
    Habits(bias=True, cache=True),
    Habits(layer_norm=True, bias=True, tied=True),
    Habits(post_norm=True, cache=True),
]


def weight(model: Model, name: str) -> gs.Constant:
    return next(c for c in model.constants() if c.name == name)


def silence(model: Model, groups: tuple[int, ...] = (1, 0)) -> None:
    """Let one key head of each layer, with its query heads, say nothing."""
    for layer, group in enumerate(groups):
        tensor = weight(model, f"{layer}.o")
        values = weight_of(tensor).load()
        values[group * GROUP : (group + 1) * GROUP] = 0
        tensor.values = ArrayWeight(values)


def pruned(model: Model, context: Context | None = None, **options: Any) -> tuple[Model, PassRecord]:
    after = model.copy()
    steps = [PruneHeads(**{"share": 0.5, "refit": False, **options})]
    return after, Pipeline(steps).run(after, context or Context())[0]


def inferred(model: Model) -> Model:
    infer_shapes(model)
    return model


def reasons(record: PassRecord) -> str:
    return "; ".join(skip.reason for skip in record.skipped)


def attentions(model: Model) -> list[tuple[int, int]]:
    nodes = [node for node in model.graph.nodes if is_attention(node)]
    return [(node.attrs["q_num_heads"], node.attrs["kv_num_heads"]) for node in nodes]


def packed(model: Model) -> Model:
    """Queries, keys and values of each layer from one product with a bias, as in GPT-2."""
    for layer in range(2):
        names = [f"{layer}.{part}" for part in "qkv"]
        parts = [weight_of(weight(model, name)).load() for name in names]
        biases = [weight_of(weight(model, f"{name}.bias")).load() for name in names]
        products = [weight(model, name).outputs[0] for name in names]
        op = Builder(model, f"{layer}.packed")
        whole = op.Add(
            op.MatMul(products[0].inputs[0], constant(f"{layer}.qkv", np.hstack(parts))),
            constant(f"{layer}.qkv.bias", np.hstack(biases)),
        )
        results = op.call("", "Split", whole, np.array([p.shape[1] for p in parts]), _outputs=3, axis=-1)
        for product, result in zip(products, results, strict=True):
            redirect(product.outputs[0].outputs[0].outputs[0], result)
        model.graph.nodes.extend(op.nodes)
    RemoveDeadCode().apply(model, Context())
    sort_nodes(model.graph)
    return from_proto(model.to_proto())


@pytest.mark.parametrize("habits", EVERY, ids=str)
def test_heads_that_say_nothing_go_and_nothing_changes(habits: Habits) -> None:
    model = transformer(habits)
    silence(model)
    after, record = pruned(model)
    assert record.changed == 2
    assert attentions(after) == [(HEADS // 2, KV_HEADS // 2)] * 2
    assert [entry["kept"] for entry in record.detail["layers"]] == [[0], [1]]
    feeds = ids(habits)
    fewer = {n: v[:, : KV_HEADS // 2] if n.startswith("past") else v for n, v in feeds.items()}
    expected, actual = run_all(model.to_proto(), feeds), run_all(after.to_proto(), fewer)
    # The products sum fewer zeros, perhaps in another order.
    np.testing.assert_allclose(actual["logits"], expected["logits"], atol=1e-4)
    if habits.cache:
        np.testing.assert_allclose(actual["present.0.key"], expected["present.0.key"][:, :1], atol=1e-6)


def test_one_product_for_queries_keys_and_values_becomes_three() -> None:
    model = packed(transformer(Habits(bias=True, cache=True)))
    silence(model)
    after, record = pruned(model)
    assert record.changed == 2, reasons(record)
    assert not [node for node in after.graph.nodes if node.op == "Split"]
    shapes = {c.name: c.shape for c in after.constants()}
    assert shapes["0.qkv_query"] == (SIZE, SIZE // 2)
    assert shapes["0.qkv.bias_key"] == (WIDTH,)
    feeds = ids(Habits(cache=True))
    fewer = {n: v[:, :1] if n.startswith("past") else v for n, v in feeds.items()}
    expected, actual = run_all(model.to_proto(), feeds), run_all(after.to_proto(), fewer)
    np.testing.assert_allclose(actual["logits"], expected["logits"], atol=1e-4)


def test_inputs_and_outputs_say_how_many_heads_are_left() -> None:
    after, record = pruned(transformer(Habits(cache=True)))
    caches = [t for t in (*after.graph.inputs, *after.graph.outputs) if "." in t.name]
    assert len(caches) == 8
    assert {t.shape[1] for t in caches} == {1}
    assert record.detail["config"] == {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": WIDTH}


@pytest.mark.parametrize("habits", [Habits(), Habits(bias=True, heavy=True)], ids=str)
def test_the_fit_makes_good_for_what_is_missing(tmp_path: Path, habits: Habits) -> None:
    model = transformer(habits)
    statistics = statistics_of(model, habits, tmp_path)
    feeds = ids(habits, 8, 12, seed=77)
    expected = run_all(model.to_proto(), feeds)["logits"]

    def error(**options: Any) -> float:
        after, record = pruned(model, Context(statistics=statistics), **options)
        assert record.changed == 2
        return float(np.square(run_all(after.to_proto(), feeds)["logits"] - expected).mean())

    assert error(refit=True) < error(refit=False)


def test_later_passes_see_the_heads_that_are_left(tmp_path: Path) -> None:
    habits = Habits(cache=True)
    model = transformer(habits)
    ranges = {"present.0.key": np.arange(KV_HEADS * WIDTH, dtype=np.float64).reshape(KV_HEADS, WIDTH)}
    context = Context(statistics=statistics_of(model, habits, tmp_path), cache_ranges=ranges)
    _, record = pruned(model, context, refit=True)
    assert context.statistics is not None
    moments = context.statistics.of_weight("0.o")
    assert moments is not None
    assert moments.size == GROUP
    assert context.cache_ranges is not None
    kept = record.detail["layers"][0]["kept"]
    np.testing.assert_array_equal(context.cache_ranges["present.0.key"], ranges["present.0.key"][kept])


def test_without_uniform_the_cheapest_of_all_go() -> None:
    model = transformer(Habits(cache=True))
    silence(model, groups=(1,))
    context = Context()
    after, record = pruned(model, context, share=0.25, uniform=False)
    assert record.changed == 1
    assert context.notes == ["attentions have different numbers of heads now, which no config.json can say"]
    assert attentions(after) == [(2, 1), (4, 2)]
    assert "heads of other attentions cost less" in reasons(record)
    assert record.detail["config"] == {}


def test_costs_are_what_is_lost(tmp_path: Path) -> None:
    """Of one attention: the error of the product behind it on the data, with and without the fit."""
    habits = Habits()
    model = inferred(transformer(habits))
    statistics = statistics_of(model, habits, tmp_path)
    layer = find_head_layers(model, Change())[0]
    moments = statistics.of_weight("0.o")
    assert moments is not None
    gram = moments.load().fit.gram
    assert gram is not None
    values = weight_of(weight(model, "0.o")).load().astype(np.float64)
    signal = np.einsum("kn,kn->", gram @ values, values)
    for fitted in (False, True):
        ranking = rank_groups(layer, moments, fitted=fitted)
        kept = layer.rows(ranking.kept(1))
        change = values.copy()
        change[kept] -= fitted_rows(values, kept, gram) if fitted else values[kept]
        lost = np.einsum("kn,kn->", gram @ change, change) / signal
        # The damping of the least squares, 1 % of the mean diagonal, is in the costs and not in the loss.
        assert ranking.costs[0] == pytest.approx(lost, rel=0.1 if fitted else 1e-6)


def test_the_cheapest_heads_of_all_attentions() -> None:
    rankings = [Ranking((0, 1, 2), (0.1, 0.5)), Ranking((1, 0), (0.2,)), Ranking((2, 0, 1), (0.05, 0.06))]
    assert leave_out(rankings, 3) == [1, 0, 2]
    assert leave_out(rankings, 99) == [2, 1, 2]  # one stays in each
    assert rankings[2].kept(2).tolist() == [0, 1]


# what cannot be


def test_heads_that_would_break_groups_are_refused() -> None:
    with pytest.raises(UsageError, match="3 query heads cannot stay: each key head has 2 of them") as caught:
        pruned(transformer(), keep=3)
    assert caught.value.todo == "choose keep=2 or 4"


def test_keep_counts_query_heads() -> None:
    after, record = pruned(transformer(), keep=2)
    assert record.changed == 2
    assert attentions(after) == [(2, 1)] * 2


def test_one_key_head_always_stays() -> None:
    once, _ = pruned(transformer(), share=0.9)
    again, record = pruned(once, share=0.9)
    assert not record.changed
    assert "of 1 key heads none can go" in reasons(record)
    assert_same_logits(once, again, ids(Habits()))


@pytest.mark.parametrize(
    ("name", "reason"), [("0.o", "'0.o' is stored once for several uses"), ("0.q", "is stored once for several uses")]
)
def test_shared_weights_stay(name: str, reason: str) -> None:
    model = transformer()
    weight(model, name.replace("0", "1")).values = weight(model, name).values
    _, record = pruned(model)
    assert not record.changed
    assert reason in reasons(record)


def test_quantized_weights_stay() -> None:
    model = transformer()
    Pipeline([QuantizeWeights(bits=8, block=16, min_elements=0)]).run(model)
    _, record = pruned(model)
    assert not record.changed
    assert "is no product with a weight that could be changed" in reasons(record)


def test_all_attentions_with_caches_or_none() -> None:
    _, record = pruned(transformer(Habits(cache=True)), exclude=("^1.o$",))
    assert not record.changed
    assert "'1.attention' keeps its heads, and all attentions need the same number" in reasons(record)
    after, record = pruned(transformer(), exclude=("^1.o$",))  # without caches nobody needs that
    assert record.changed == 1
    assert attentions(after) == [(2, 1), (4, 2)]


def test_what_is_read_elsewhere_stays() -> None:
    model = transformer()
    values = weight(model, "0.v").outputs[0].outputs[0]
    model.graph.outputs.append(values)
    values.dtype, values.shape = np.dtype(np.float32), ["B", "S", KV_HEADS * WIDTH]
    _, record = pruned(model)
    assert f"'{values.name}' is an output of the model" in reasons(record)


def test_an_attention_in_pieces_is_named() -> None:
    model = transformer()
    model.graph.nodes[:] = [node for node in model.graph.nodes if not is_attention(node)]
    change = PruneHeads(refit=False).apply(model, Context())
    assert "no attention is fused" in change.skipped[0].reason


@pytest.mark.parametrize(
    "options", [{"share": 1.0}, {"share": -0.1}, {"keep": -1}, {"keep": 2, "uniform": False}, {"exclude": ("(",)}]
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        PruneHeads(**options)


def test_data_are_asked_for() -> None:
    with pytest.raises(UsageError, match="without calibration data"):
        pruned(transformer(), refit=True)
