"""Gains of tables that are a product's weight as well: one initializer or two, all weights or only these."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim_llm.stats.calibration import TensorCalibration
from onnxslim_llm.stats.collect import collect
from onnxslim_llm.stats.gains import measure_gains
from onnxslim_llm.stats.statistics import Gain

VOCABULARY, WIDTH, SHRUNK = 96, 48, 0.1
#: A gain is measured with one error drawn at random in some thousand numbers: it scatters by some percent.
SCATTER = 0.15


def _save(folder: Path, *, stored_twice: bool) -> Path:
    """y = (0.1 E[ids] + E[ids] A) E^T: a table, a product between, and the table as classifier."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
    weights = {"E": table, "A": rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 7, "s": np.float32(SHRUNK)}
    nodes = [
        helper.make_node("Gather", ["E", "ids"], ["e"]),
        helper.make_node("Mul", ["e", "s"], ["small"]),
        helper.make_node("MatMul", ["e", "A"], ["a"]),
        helper.make_node("Add", ["small", "a"], ["h"]),
    ]
    if stored_twice:
        weights["head"] = np.ascontiguousarray(table.T)
    else:
        nodes.append(helper.make_node("Transpose", ["E"], ["head"], perm=[1, 0]))
    nodes.append(helper.make_node("MatMul", ["h", "head"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["T"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", VOCABULARY])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    path = folder / f"{stored_twice}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def _gains(path: Path, *, only_tied: bool) -> dict[str, Gain]:
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (4, 128))
    data = TensorCalibration(tuple({"ids": row} for row in ids))
    statistics = collect(path, path.name, data, path.with_suffix(""))[0]
    found = measure_gains(path, data, statistics, only_tied=only_tied, threads=1)
    assert measure_gains(path, data, statistics, only_tied=only_tied) == found  # as it was stored
    return found


@pytest.mark.parametrize("only_tied", [False, True])
def test_a_tied_weight_has_two_gains_however_it_is_stored(tmp_path: Path, only_tied: bool) -> None:
    twice, once = (_gains(_save(tmp_path, stored_twice=way), only_tied=only_tied) for way in (True, False))
    rest = set() if only_tied else {"A"}
    assert set(twice) == {"E", "head"} | rest
    assert set(once) == {"E"} | rest
    assert once["E"].looked_up is not None
    assert (once["E"].of_table, once["E"].looked_up.of_table) == (False, True)
    assert once["E"].per_square == pytest.approx(twice["head"].per_square, rel=SCATTER)
    assert once["E"].looked_up.per_square == pytest.approx(twice["E"].per_square, rel=SCATTER)


def test_weights_of_one_shape_are_not_tied_for_that(tmp_path: Path) -> None:
    path = _save(tmp_path, stored_twice=True)
    proto = onnx.load(path)
    head = next(tensor for tensor in proto.graph.initializer if tensor.name == "head")
    head.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(head) + np.float32(0.5), "head"))
    onnx.save(proto, path)
    assert _gains(path, only_tied=True) == {}
