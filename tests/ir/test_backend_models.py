"""Every model that the installed onnx package ships or generates survives a round trip.

Normalisation: none. `same` serializes both protos and compares the bytes.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import onnx.backend.test
import pytest
from ir_samples import same
from onnx.backend.test.case.model import collect_testcases as collect_model_cases
from onnx.backend.test.case.node import collect_testcases as collect_node_cases

from onnxslim_llm.ir.model import from_proto, open_model
from onnxslim_llm.ir.save import SaveOptions, save_model

DATA = Path(onnx.backend.test.__file__).parent / "data"
SHIPPED = sorted(DATA.rglob("*.onnx"))


@cache
def generated() -> dict[str, onnx.ModelProto]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the generators' own arithmetic
        cases = [*collect_node_cases(None), *collect_model_cases()]
    return {case.name: case.model for case in cases if case.model is not None}


def test_there_are_many():
    assert len(generated()) > 1500
    assert len(SHIPPED) > 100


def test_generated_models_round_trip_in_memory():
    for name, proto in generated().items():
        model = from_proto(proto)
        assert model.notes == [], name
        assert same(model.to_proto(), proto), name
        assert same(model.copy().to_proto(), proto), f"copy of {name}"
        stub, weights = model.to_stub()
        assert same(from_proto(stub, weights=weights).to_proto(), proto), f"stub of {name}"


@pytest.mark.parametrize("every", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_generated_models_round_trip_through_files(every, tmp_path):
    path, saved = tmp_path / "m.onnx", tmp_path / "n.onnx"
    for name, proto in list(generated().items())[::every]:
        path.write_bytes(proto.SerializeToString())
        save_model(open_model(path), saved, SaveOptions(external=False))
        assert same(onnx.load(saved), proto), name


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(DATA)))
def test_shipped_models_round_trip(path, tmp_path):
    proto = onnx.load(path)
    model = open_model(path)
    assert same(model.to_proto(), proto)
    assert same(model.copy().to_proto(), proto)
    saved = tmp_path / "m.onnx"
    save_model(model, saved)
    assert same(open_model(saved).to_proto(), proto)
