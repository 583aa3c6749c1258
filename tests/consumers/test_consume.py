from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxslim_llm.bounded import run_bounded
from onnxslim_llm.compiler.portability import Checker
from onnxslim_llm.consumers.consumer import CONSUMERS, TOLERANCE, Consumer, consume, find_consumer
from onnxslim_llm.errors import UsageError

ORT = find_consumer("onnxruntime")
TEXT = '<ir_version: 10, opset_import: ["" : 21]> g (float[2, 3] x) => (float[2, 3] y) { y = Relu (x) }'
FEEDS = {"x": np.array([[-1, 2, -3], [4, -5, 6]], np.float32)}


@pytest.fixture
def relu(tmp_path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(TEXT), tmp_path / "relu.onnx")
    return tmp_path / "relu.onnx"


def test_results_are_compared(relu: Path) -> None:
    report = consume(ORT, relu, "source", FEEDS, {"y": np.maximum(FEEDS["x"], 0)})
    assert (report.status, report.max_abs, report.absmax, report.output) == ("runs", 0.0, 6.0, "y")


def test_wrong_results_are_no_success(relu: Path) -> None:
    report = consume(ORT, relu, "source", FEEDS, {"y": FEEDS["x"]})
    assert report.status == "differs"
    assert report.max_abs == 5.0


def test_a_missing_output_is_told(relu: Path) -> None:
    report = consume(ORT, relu, "source", FEEDS, {"z": FEEDS["x"]})
    assert report.status == "failed"
    assert "z" in report.detail


def test_a_model_that_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    report = consume(ORT, tmp_path / "bad.onnx", "source", FEEDS, {"y": FEEDS["x"]})
    assert report.status == "failed"
    assert report.detail


def test_a_consumer_that_hangs_is_ended(relu: Path) -> None:
    report = consume(ORT, relu, "source", FEEDS, {"y": FEEDS["x"]}, seconds=0.01)
    assert report.status == "failed"
    assert report.detail.startswith("timed out after 0.01 s")


def test_a_child_that_crashes_does_not_take_us_along() -> None:
    outcome = run_bounded("onnxslim_llm.consumers.worker", {}, seconds=60)
    assert not outcome.finished
    assert outcome.ended == "exit code 1"
    assert "KeyError" in outcome.tail(3)


def test_what_is_not_installed_says_how_to_get_it(sample_dir: Path) -> None:
    absent = replace(CONSUMERS[0], name="nowhere", packages=("no-such-package-1",), extra="mnn")
    (report,) = Checker(sample_dir, "batch=1,seq=4,past=0").run([absent])
    assert report.status == "not installed"
    assert report.detail == 'no-such-package-1 is not installed: pip install "onnxslim-llm[mnn]"'


def test_a_size_that_fits_nothing(sample_dir: Path) -> None:
    with pytest.raises(UsageError, match="no dimension of an input is called 'lines'"):
        list(Checker(sample_dir, "lines=4").run([ORT]))


@pytest.mark.parametrize("consumer", [c for c in CONSUMERS if c.name != "litert"], ids=lambda c: c.name)
@pytest.mark.runtimes
def test_the_sample_runs_everywhere(consumer: Consumer, sample_dir: Path) -> None:
    there, why = consumer.installed()
    if not there:
        pytest.skip(why)
    (report,) = Checker(sample_dir, "batch=1,seq=8,past=0", seconds=300).run([consumer])
    assert report.status == "runs", report
    assert report.max_abs is not None
    assert report.absmax is not None
    assert report.max_abs <= TOLERANCE * report.absmax
