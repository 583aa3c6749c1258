"""onnxslim-llm sweep, as a user has it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from reference_decoder import DecoderSpec, build

Run = Callable[..., object]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, sample_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    onnx.save(build(DecoderSpec(vocab=2048)), folder / "model.onnx")
    shutil.copy(sample_dir / "tokenizer.json", folder)
    (folder / "text.txt").write_text((sample_dir / "heldout.txt").read_text()[:500])
    return folder


def test_json_is_the_record_and_progress_goes_to_stderr(cli: Run, model: Path, tmp_path: Path) -> None:
    grid = ["--grid", "quantize_weights.bits=4,8", "--recipes", "safe,int4"]
    common = [model, "-o", "out", "--text", model / "text.txt", "--bench-rounds", "0", "--jobs", "1"]
    done = cli("sweep", *common, *grid, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record == json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [p["settings"] for p in record["points"]] == [{}, *({"quantize_weights.bits": b} for b in (4, 8))]
    assert "3 of 3 int4-bits-8" in done.stderr
    table = cli("sweep", *common, *grid)
    assert table.returncode == 0, table.stderr
    assert table.stdout.count("int4") == 2
    assert "(known)" in table.stderr


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
