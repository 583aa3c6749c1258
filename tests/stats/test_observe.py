"""Tensors of a graph, seen sample by sample."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.model import Model, from_proto
from onnxslim_llm.runtime.session import Session
from onnxslim_llm.stats import observe
from onnxslim_llm.stats.observe import GraphObserver

MODEL = """<ir_version: 9, opset_import: ["" : 17]>
g (float[n, 4] x) => (float[n, 4] y) <float[4] w = {1, -2, 3, 0}> {
    h = Mul (x, w)
    r = Relu (h)
    y = Log (r)
}"""


class Seen:
    def __init__(self) -> None:
        self.samples: list[NDArray[Any]] = []

    def add(self, values: NDArray[Any]) -> None:
        self.samples.append(values)


class Picky:
    def add(self, values: NDArray[Any]) -> None:
        if np.isinf(values).any():
            raise FloatingPointError("infinite values")


def model() -> Model:
    return from_proto(onnx.parser.parse_model(MODEL))


def samples(session: Session) -> Iterator[dict[str, NDArray[Any]]]:
    for n in (1, 3, 2):
        yield {"x": np.full((n, 4), n, np.float32), "more": np.zeros(1, np.float32)}


def test_every_sample_of_every_tensor_is_handed_on() -> None:
    inner, given, final = Seen(), Seen(), Seen()
    GraphObserver(samples).observe(model(), {"h": inner, "x": given, "y": final})
    assert [len(s) for s in inner.samples] == [1, 3, 2]
    np.testing.assert_array_equal(inner.samples[1], np.tile(np.float32([3, -6, 9, 0]), (3, 1)))
    np.testing.assert_array_equal(given.samples[2], np.full((2, 4), 2, np.float32))
    np.testing.assert_allclose(final.samples[0][0, [0, 2]], np.log([1.0, 3.0]), rtol=1e-6)


def test_more_tensors_than_fit_take_several_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    run = Session.run

    def counted(self: Session, feeds: dict[str, Any], outputs: list[str] | None = None) -> dict[str, Any]:
        ran.append(list(outputs or []))
        return run(self, feeds, outputs)

    monkeypatch.setattr(Session, "run", counted)
    inner, relu = Seen(), Seen()
    GraphObserver(samples, held_bytes=20).observe(model(), {"h": inner, "r": relu})
    assert ["h"] in ran
    assert ["r"] in ran
    assert [len(s) for s in inner.samples] == [len(s) for s in relu.samples] == [1, 3, 2]


def test_large_models_run_from_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "IN_MEMORY_BYTES", 8)
    inner = Seen()
    GraphObserver(samples).observe(model(), {"h": inner})
    np.testing.assert_array_equal(inner.samples[0], np.float32([[1, -2, 3, 0]]))


def test_a_refused_tensor_is_named() -> None:
    with pytest.raises(ModelError, match="infinite values") as caught:
        GraphObserver(samples).observe(model(), {"y": Picky()})
    assert caught.value.where == "tensor 'y'"


def test_nothing_asked_for_runs_nothing() -> None:
    def never(session: Session) -> Iterator[dict[str, NDArray[Any]]]:
        raise AssertionError

    GraphObserver(never).observe(model(), {})
