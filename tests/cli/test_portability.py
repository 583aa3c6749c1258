"""targets --check and --lint-only, and compile --shape, as they are called."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[n, 4] x) => (float[n, 4] y) <float[4] mask = {0, 0, 0, -3.4e38}> {
        a = Add (x, mask)
        e = Erf (a)
        y = Softmax <axis = -1> (e)
    }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "masked.onnx")
    return tmp_path / "masked.onnx"


def test_lint_names_node_rule_and_fix(cli: Run, masked: Path) -> None:
    done = cli("targets", "--target", "qnn-htp", "--lint-only", masked)
    assert done.returncode == 4
    assert "input 'x', axis 0\n  the size 'n' is not fixed\n  to do: --shape n=" in done.stdout
    assert "HTP has no Erf" in done.stdout
    assert "legalize_masks" in done.stdout


def test_lint_with_sizes_as_json(cli: Run, masked: Path) -> None:
    done = cli("targets", "qnn-htp", "--lint-only", masked, "--shape", "n=3", "--json")
    found = json.loads(done.stdout)
    assert [v["where"] for v in found["violations"]] == ["Add 'a'", "Erf 'e'"]
    assert cli("targets", "portable", "--lint-only", masked).returncode == 0


def test_lint_needs_a_target(cli: Run, masked: Path) -> None:
    done = cli("targets", "--lint-only", masked)
    assert done.returncode == 2
    assert "--lint-only needs a target" in done.stderr


def test_check_compares_with_the_source(cli: Run, masked: Path) -> None:
    done = cli("targets", "--check", masked, "--only", "onnxruntime", "--shape", "n=3", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (report,) = json.loads(done.stdout)["reports"]
    assert (report["consumer"], report["form"], report["status"]) == ("onnxruntime", "source", "runs")
    assert report["max_abs"] < 1e-6


def test_check_of_an_unknown_runtime(cli: Run, masked: Path) -> None:
    done = cli("targets", "--check", masked, "--only", "onxruntime")
    assert done.returncode == 2
    assert "did you mean 'onnxruntime'" in done.stderr


def test_compile_with_fixed_sizes(cli: Run, decoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "fixed"
    done = cli("compile", decoder, "-o", out, "--recipe", "safe", "--shape", "batch=1,seq=4,past=0,total=4", "--json")
    assert done.returncode == 0, done.stderr
    inputs = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in onnx.load(out / "model.onnx").graph.input
    }
    assert inputs == {"input_ids": [1, 4], "attention_mask": [1, 4], "position_ids": [1, 4]}
    verify = json.loads(done.stdout)["verify"]
    assert all(gate["ok"] for gate in verify["gates"])
    assert not (out / "fixed").exists()


def test_a_step_with_a_full_cache_is_verified_on_real_caches(cli: Run, decoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "step"
    done = cli("compile", decoder, "-o", out, "--recipe", "safe", "--shape", "batch=1,seq=1,past=7,total=8", "--json")
    assert done.returncode == 0, done.stderr
    verify = json.loads(done.stdout)["verify"]
    assert verify["inputs"][0].startswith("step-")
    assert all(gate["ok"] for gate in verify["gates"])


def test_bad_options(cli: Run, decoder: Path, tmp_path: Path) -> None:
    done = cli("compile", decoder, "-o", tmp_path / "a", "--shape", "lines=3")
    assert done.returncode == 2
    assert "no dimension of an input is called 'lines'" in done.stderr
    done = cli("compile", decoder, "-o", tmp_path / "a", "--target-option", "fast")
    assert done.returncode == 2
    assert "'fast' is no NAME=VALUE" in done.stderr
