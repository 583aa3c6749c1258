"""Runtimes of other people, run for real: what is told of them, and that each runs what we write."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from zoo.access import model_path

from onnxslim_llm.bounded import run_bounded
from onnxslim_llm.compiler.portability import Checker
from onnxslim_llm.consumers.consumer import CONSUMERS, TOLERANCE, Consumer, consume, find_consumer
from onnxslim_llm.errors import UsageError
from onnxslim_llm.targets import get_target

ORT = find_consumer("onnxruntime")
TEXT = '<ir_version: 10, opset_import: ["" : 21]> g (float[2, 3] x) => (float[2, 3] y) { y = Relu (x) }'
#: Time limit of one runtime with one form.
SECONDS = 600.0
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


def test_another_interpreter_sees_this_package_and_nothing_beside_it(
    relu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "seen"
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nls "$PYTHONPATH" > {seen}\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("ONNXSLIM_LLM_OTHER_PYTHON", str(wrapper))
    report = consume(
        replace(ORT, python="ONNXSLIM_LLM_OTHER_PYTHON"), relu, "source", FEEDS, {"y": np.maximum(FEEDS["x"], 0)}
    )
    assert report.status == "runs"
    assert seen.read_text().split() == ["onnxslim_llm"]


@pytest.mark.runtimes
def test_what_ci_installs_is_there() -> None:
    """`.ci/run` names the runtimes that it brings: a test that is skipped there proves nothing."""
    expected = os.environ.get("ONNXSLIM_LLM_EXPECTED_RUNTIMES", "onnxruntime onnx_reference").split()
    known = {consumer.name: consumer.installed() for consumer in CONSUMERS}
    known["qnn-htp"] = get_target("qnn-htp").installed()
    missing = {name: known[name][1] for name in expected if not known[name][0]}
    assert missing == {}


@pytest.mark.parametrize("consumer", [c for c in CONSUMERS if c.name != "litert"], ids=lambda c: c.name)
@pytest.mark.runtimes
def test_the_sample_runs_everywhere(consumer: Consumer, sample_dir: Path) -> None:
    runs(consumer, sample_dir, "batch=1,seq=8,past=0")


@pytest.mark.parametrize("consumer", [c for c in CONSUMERS if not c.decoders_only], ids=lambda c: c.name)
@pytest.mark.runtimes
@pytest.mark.zoo
def test_a_small_encoder_runs_everywhere(consumer: Consumer) -> None:
    """MiniLM's kind of graph; onnx2tf, which takes minutes for the sample, has this one only."""
    runs(consumer, model_path("bert", "optimum"), "batch=1,seq=8")


def runs(consumer: Consumer, model: Path, shape: str) -> None:
    there, why = consumer.installed()
    if not there:
        pytest.skip(why)
    (report,) = Checker(model, shape, seconds=SECONDS).run([consumer])
    assert report.status == "runs", report
    assert report.max_abs is not None
    assert report.absmax is not None
    assert report.max_abs <= TOLERANCE * report.absmax
