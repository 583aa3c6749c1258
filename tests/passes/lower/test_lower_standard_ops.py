from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from concept_models import Array, assert_same_results, call_model, lower
from fusion_checks import floats

from onnxslim_llm.concepts.activation import GELU, GELU_TANH, SWISH
from onnxslim_llm.concepts.concept import Concept
from onnxslim_llm.concepts.normalization import RMS_NORM
from onnxslim_llm.concepts.rotary import ROTARY, RotaryPairs

#: Float32 sums of a dozen terms around one, in another order.
TOLERANCE = 2e-6
#: A few roundings to the 11 bits of float16.
HALF_TOLERANCE = 2**-9
STEPS = "lower_standard_ops, cleanup"
X: dict[str, list[int | str | None]] = {"X": ["b", "s", 8], "scale": [8]}

#: (concept, attributes, opset, operators).
CASES: list[tuple[Concept, dict[str, Any], int, dict[str, int]]] = [
    (RMS_NORM, {"epsilon": 1e-6}, 18, {"Pow": 1, "ReduceMean": 1, "Add": 1, "Sqrt": 1, "Div": 1, "Mul": 1}),
    (RMS_NORM, {"epsilon": 1e-6}, 23, {"RMSNormalization": 1}),
    (GELU, {}, 18, {"Div": 1, "Erf": 1, "Add": 1, "Mul": 2}),
    (GELU, {}, 20, {"Gelu": 1}),
    (GELU_TANH, {}, 18, {"Pow": 1, "Mul": 4, "Add": 2, "Tanh": 1}),
    (GELU_TANH, {}, 20, {"Gelu": 1}),
    (SWISH, {"alpha": 1.0}, 18, {"Sigmoid": 1, "Mul": 1}),
    (SWISH, {"alpha": 1.0}, 24, {"Sigmoid": 1, "Mul": 1}),
    (SWISH, {"alpha": 1.702}, 24, {"Sigmoid": 1, "Mul": 2}),
]


def feeds_of(concept: Concept, dtype: Any = np.float32) -> dict[str, Array]:
    feeds = {"X": floats(2, 3, 8, dtype=dtype)}
    return {**feeds, "scale": floats(8, seed=1, dtype=dtype)} if concept is RMS_NORM else feeds


@pytest.mark.parametrize(("concept", "attributes", "opset", "operators"), CASES)
def test_each_concept(concept: Concept, attributes: dict[str, Any], opset: int, operators: dict[str, int]) -> None:
    feeds = feeds_of(concept)
    model = call_model(concept, feeds, attributes, X, opset)
    source = model.copy()
    ops, record = lower(model, STEPS, "portable")
    assert ops == operators
    assert record.changed == 1
    assert model.opset() == opset
    assert model.functions == []
    assert_same_results(source, model, feeds, TOLERANCE)


@pytest.mark.parametrize(("concept", "attributes", "opset"), [case[:3] for case in CASES])
def test_half_precision(concept: Concept, attributes: dict[str, Any], opset: int) -> None:
    feeds = feeds_of(concept, np.float16)
    model = call_model(concept, feeds, attributes, X, opset)
    source = model.copy()
    lower(model, STEPS, "portable")
    assert_same_results(source, model, feeds, HALF_TOLERANCE)


@pytest.mark.parametrize("alpha", [1.0, 1.702])
def test_swish_as_an_operator_if_it_is_wanted(alpha: float) -> None:
    feeds = feeds_of(SWISH)
    model = call_model(SWISH, feeds, {"alpha": alpha}, X, 24)
    source = model.copy()
    ops, _ = lower(model, 'lower_standard_ops{swish="operator"}', "portable")
    assert ops == {"Swish": 1}
    assert_same_results(source, model, feeds, TOLERANCE)


def rotary_feeds(width: int, rotated: int, rows: int) -> dict[str, Array]:
    return {
        "X": floats(2, 3, width),
        "cosines": floats(rows, 3, rotated // 2, seed=1),
        "sines": floats(rows, 3, rotated // 2, seed=2),
    }


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
@pytest.mark.parametrize("rotated", [8, 4])
@pytest.mark.parametrize(("rows", "batch"), [(2, "b"), (1, 1), (1, None), (2, None)])
def test_rotary(pairs: RotaryPairs, rotated: int, rows: int, batch: int | str | None) -> None:
    feeds = rotary_feeds(32, rotated, rows)
    table: list[int | str | None] = [batch, "s", rotated // 2]
    model = call_model(
        ROTARY[pairs],
        feeds,
        {"num_heads": 4, "rotary_dim": rotated},
        {"X": ["b", "s", 32], "cosines": table, "sines": table},
        23,
    )
    source = model.copy()
    ops, _ = lower(model, STEPS, "portable")
    assert ops["RotaryEmbedding"] == 1
    assert ops["Expand"] == (0 if batch == "b" else 2)
    assert_same_results(source, model, feeds, TOLERANCE)


def test_rotary_of_older_opsets() -> None:
    feeds = rotary_feeds(32, 8, 2)
    table: list[int | str | None] = ["b", "s", 4]
    model = call_model(
        ROTARY["half"],
        feeds,
        {"num_heads": 4, "rotary_dim": 8},
        {"X": ["b", "s", 32], "cosines": table, "sines": table},
        21,
    )
    source = model.copy()
    ops, _ = lower(model, STEPS, "portable")
    assert ops["RotaryEmbedding"] == 0
    assert_same_results(source, model, feeds, TOLERANCE)


def test_a_model_without_concepts_is_left() -> None:
    model = call_model(SWISH, feeds_of(SWISH), {"alpha": 1.0}, X)
    lower(model, STEPS, "portable")
    _, record = lower(model, "lower_standard_ops", "portable")
    assert record.changed == 0


def test_names_of_outputs_stay() -> None:
    model = call_model(GELU, feeds_of(GELU), {}, X, 20)
    lower(model, STEPS, "portable")
    assert [node.outputs[0].name for node in model.graph.nodes] == ["Y"]
