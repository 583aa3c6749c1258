"""The verbs that only look: what they print, as text and as JSON."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]


def as_json(done: subprocess.CompletedProcess[str]) -> object:
    """The JSON on stdout, with nothing on stderr beside it."""
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_doctor_finds_this_environment_healthy(cli: Run) -> None:
    found = as_json(cli("doctor", "--json"))
    assert isinstance(found, dict)
    assert found["healthy"] is True
    states = {check["name"]: check["state"] for check in found["checks"]}
    assert {states[name] for name in ("python", "cpu", "libraries", "onnxruntime")} == {"ok"}
    text = cli("doctor")
    assert text.returncode == 0
    assert "onnxruntime" in text.stdout


def test_targets(cli: Run) -> None:
    found = as_json(cli("targets", "--json"))
    assert isinstance(found, list)
    assert {target["name"] for target in found} >= {"portable", "ort-cpu"}
    one = as_json(cli("targets", "ort-cpu", "--json"))
    assert isinstance(one, dict)
    assert "com.microsoft" in one["domains"]


def test_passes_and_recipes(cli: Run) -> None:
    found = as_json(cli("passes", "--json"))
    assert isinstance(found, dict)
    names = [one["name"] for one in found["passes"]]
    assert "quantize_weights" in names
    assert all(one["summary"] for one in found["passes"])
    assert {"safe", "int8", "int4"} <= {recipe["name"] for recipe in found["recipes"]}
    assert all(recipe["when"] for recipe in found["recipes"])
    page = cli("passes", "quantize_weights")
    assert page.returncode == 0
    assert "block" in page.stdout


def test_inspect(cli: Run, decoder: Path) -> None:
    found = as_json(cli("inspect", decoder, "--json"))
    assert isinstance(found, dict)
    assert found["decoder"] is True
    assert found["blocks"] == 2
    assert set(found["bytes_by_role"]) >= {"embedding", "attention", "ffn", "norm", "lm_head"}
    assert found["weight_bytes"] == sum(found["bytes_by_role"].values())
    text = cli("inspect", decoder)
    assert text.returncode == 0
    assert "decoder, 2 blocks" in text.stdout
    assert "MatMul" in text.stdout


def test_diff_of_a_model_with_itself(cli: Run, decoder: Path) -> None:
    found = as_json(cli("diff", decoder, decoder, "--json"))
    assert isinstance(found, dict)
    assert found["structure"]["ops"] == {}
    layers = found["layers"]["layers"]
    assert len(layers) > 50
    assert all(layer["max_abs"] == 0 for layer in layers)
    text = cli("diff", decoder, decoder)
    assert "are equal" in text.stdout
    assert "SQNR" not in cli("diff", decoder, decoder, "--no-run").stdout


def test_bench_measures_models_in_turn(cli: Run, decoder: Path) -> None:
    found = as_json(
        cli("bench", decoder, "--vs", decoder, "--repeats", 1, "--prompt-tokens", 8, "--new-tokens", 4, "--json")
    )
    assert isinstance(found, dict)
    assert len(found["results"]) == 2
    for result in found["results"]:
        assert result["prefill_tokens_per_second"] > 0
        assert result["decode_tokens_per_second"] > 0
        assert result["peak_rss_bytes"] > 0
        assert result["file_bytes"] == sum(file.stat().st_size for file in decoder.parent.glob("tiny.onnx*"))


def test_a_model_without_a_tokenizer_cannot_generate(cli: Run, decoder: Path) -> None:
    done = cli("generate", decoder, "--prompt", "x")
    assert done.returncode == 2
    assert "--tokenizer" in done.stderr
