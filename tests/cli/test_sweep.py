"""onnxslim-llm sweep, as a user has it."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from reference_decoder import DecoderSpec, build

Run = Callable[..., subprocess.CompletedProcess[str]]

DEADLINE = 60.0  # seconds for a process to end after Ctrl-C


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, sample_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    onnx.save(build(DecoderSpec(vocab=2048)), folder / "model.onnx")
    shutil.copy(sample_dir / "tokenizer.json", folder)
    (folder / "text.txt").write_text((sample_dir / "heldout.txt").read_text()[:500])
    return folder


def test_json_is_the_record_and_progress_goes_to_stderr(cli: Run, model: Path, tmp_path: Path) -> None:
    grid = ["--grid", "quantize_weights.bits=4,8", "--recipes", "safe,int4-fast"]
    common = [model, "-o", "out", "--text", model / "text.txt", "--bench-rounds", "0", "--jobs", "1"]
    done = cli("sweep", *common, *grid, "--json", timeout=600)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record == json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [p["settings"] for p in record["points"]] == [{}, *({"quantize_weights.bits": b} for b in (4, 8))]
    assert "3 of 3 int4-fast-bits-8" in done.stderr
    table = cli("sweep", *common, *grid, timeout=600)
    assert table.returncode == 0, table.stderr
    assert table.stdout.count("int4-fast") == 2
    assert "(known)" in table.stderr


def test_an_interruption_ends_with_130_and_keeps_the_rows(
    model: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    command = [sys.executable, "-m", "onnxslim_llm", "sweep", model, "-o", "out", "--text", model / "text.txt"]
    command += ["--recipe", "int4-fast", "--grid", "quantize_weights.bits=2,4,8", "--bench-rounds", "0", "--jobs", "1"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = next(line for line in process.stderr if "1 of 3" in line)
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 130, told
    kept = [row["quantize_weights.bits"] for row in csv.DictReader((tmp_path / "out" / "sweep.csv").open())]
    assert kept in (["2"], ["2", "4"])
    assert not (tmp_path / "out" / ".work").exists()
    assert not (tmp_path / "out" / ".lock").exists()


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--grid", "quantize_weight.bits=4"], "unknown pass 'quantize_weight'", "did you mean 'quantize_weights'"),
        (["--grid", "quantize_weights.bit=4"], "no option 'bit'", "did you mean 'bits'"),
        (["--recipes", "int5"], "unknown recipe 'int5'", "'int4'"),
        (["--target", "ort-gpu"], "unknown target 'ort-gpu'", "'ort-cpu'"),
        (["--text", "nowhere.txt"], "no such text file", "check the path"),
        (["--calib", "nowhere.txt"], "no such calibration file", "check the path"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    cli: Run, model: Path, tmp_path: Path, arguments: list[str], message: str, hint: str
) -> None:
    done = cli("sweep", model, "-o", "out", "--text", model / "text.txt", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert hint in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("*"))
