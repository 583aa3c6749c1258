"""The harness sees what it is for: each test breaks a model in the way that a wrong fusion would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from zoo.access import exported, model_path
from zoo.equality import TOLERANCE, Equality, compare, delta
from zoo.families import WINDOW, family

Edited = Callable[[Callable[[onnx.GraphProto], None]], Path]


def wrong(found: Equality) -> set[str]:
    return {case.name for case in found.cases if not case.max_abs <= TOLERANCE}


def read_instead(graph: onnx.GraphProto, name: str, *nodes: onnx.NodeProto) -> None:
    """Everything that reads the input `name` reads the output of the last of `nodes`."""
    for node in graph.node:
        for i, wanted in enumerate(node.input):
            if wanted == name:
                node.input[i] = nodes[-1].output[0]
    for node in reversed(nodes):
        graph.node.insert(0, node)


def constant(name: str, value: list[int]) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(value, np.int64)))


def test_a_model_equals_itself(llama: Path) -> None:
    found = compare(llama, llama)
    found.check()
    names = {case.name for case in found.cases}
    assert {"prompt, batch 3", "chunks, batch 2", "left padding", "right padding", "every second position"} <= names
    assert not found.skipped


def test_a_lost_norm_weight(llama: Path, edited: Edited) -> None:
    def change(graph: onnx.GraphProto) -> None:
        weight = next(t for t in graph.initializer if list(t.dims) == [64])
        weight.CopyFrom(numpy_helper.from_array(np.ones(64, np.float32), weight.name))

    found = compare(llama, edited(change))
    assert wrong(found) == {case.name for case in found.cases}
    assert found.greedy_match < 1


def test_a_mask_that_is_not_read(llama: Path, edited: Edited) -> None:
    def change(graph: onnx.GraphProto) -> None:
        one = helper.make_node("ConstantOfShape", ["mask_shape"], ["all"], value=helper.make_tensor("", 7, [1], [1]))
        read_instead(graph, "attention_mask", helper.make_node("Shape", ["attention_mask"], ["mask_shape"]), one)

    found = compare(llama, edited(change))
    # Padding on the right of a prompt is in the future of every real token: causality hides it anyway.
    assert wrong(found) == {case.name for case in found.cases if "padding" in case.name} - {"right padding"}


def test_padding_that_counts_from_the_right_only(llama: Path, edited: Edited) -> None:
    """Keys 0 to sum(mask): what an operator with sequence lengths makes of any mask."""

    def change(graph: onnx.GraphProto) -> None:
        nodes = [
            helper.make_node("Shape", ["attention_mask"], ["mask_length"], start=1),
            constant("zero", [0]),
            constant("one", [1]),
            helper.make_node("Squeeze", ["mask_length", "zero"], ["length_scalar"]),
            helper.make_node("Squeeze", ["zero", "zero"], ["zero_scalar"]),
            helper.make_node("Squeeze", ["one", "zero"], ["one_scalar"]),
            helper.make_node("Range", ["zero_scalar", "length_scalar", "one_scalar"], ["columns"]),
            helper.make_node("ReduceSum", ["attention_mask", "one"], ["real"], keepdims=1),
            helper.make_node("Less", ["columns", "real"], ["visible"]),
            helper.make_node("Cast", ["visible"], ["prefix_mask"], to=onnx.TensorProto.INT64),
        ]
        read_instead(graph, "attention_mask", *nodes)

    found = compare(llama, edited(change))
    assert {"left padding", "steps after left padding", "steps after right padding"} <= wrong(found)
    assert not wrong(found) & {"right padding", "prompt, batch 3", "steps, batch 3"}


def test_positions_that_are_derived(llama: Path, edited: Edited) -> None:
    """Positions counted from the mask, as most callers give them, instead of those that are given."""

    def change(graph: onnx.GraphProto) -> None:
        length = helper.make_node("Shape", ["position_ids"], ["new_length"], start=1)
        count = helper.make_node("CumSum", ["attention_mask", "axis"], ["counted"])
        nodes = [
            length,
            constant("axis", [1]),
            constant("end", [1 << 40]),
            constant("unit", [1]),
            count,
            helper.make_node("Sub", ["counted", "unit"], ["from_zero"]),
            helper.make_node("Neg", ["new_length"], ["last"]),
            helper.make_node("Slice", ["from_zero", "last", "end", "axis"], ["tail"]),
            constant("nothing", [0]),
            helper.make_node("Max", ["tail", "nothing"], ["derived"]),
        ]
        read_instead(graph, "position_ids", *nodes)

    found = compare(llama, edited(change))
    assert wrong(found) == {"every second position", "positions that start again"}


@pytest.mark.parametrize("window", [None, WINDOW - 1, WINDOW + 1])
def test_another_window(window: int | None) -> None:
    entry = family("mistral")
    other = replace(entry, config={**entry.config, "sliding_window": window})
    found = compare(model_path("mistral", "optimum"), exported(other, "optimum").path())
    assert "prompt, batch 1" in wrong(found)
    assert "one token" not in wrong(found)


def test_another_interface(llama: Path, edited: Edited) -> None:
    def change(graph: onnx.GraphProto) -> None:
        inputs = [*graph.input]
        del graph.input[:]
        graph.input.extend(reversed(inputs))

    with pytest.raises(AssertionError, match="inputs are"):
        compare(llama, edited(change)).check()


def test_an_encoder_that_ignores_its_mask(tmp_path: Path) -> None:
    source = model_path("bert", "optimum")
    model = onnx.load(source)
    one = helper.make_node("ConstantOfShape", ["mask_shape"], ["all"], value=helper.make_tensor("", 7, [1], [1]))
    read_instead(model.graph, "attention_mask", helper.make_node("Shape", ["attention_mask"], ["mask_shape"]), one)
    onnx.save(model, tmp_path / "changed.onnx")
    found = compare(source, tmp_path / "changed.onnx")
    assert wrong(found) == {"batch 3, left padding", "batch 3, right padding", "batch 3, holes"}


def test_deltas() -> None:
    a = np.array([[1.0, 2.0], [3.0, np.nan]], np.float32)
    assert delta(a[:1], a[:1] + 1) == 1.0
    assert np.isnan(delta(a, a))
    assert delta(a, a, np.array([1, 0])) == 0.0
    assert delta(a[:1], np.array([[1.0, np.nan]], np.float32)) == np.inf
    assert delta(a, a[:1]) == np.inf
