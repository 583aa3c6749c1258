"""A sweep from end to end: what it measures, keeps, and goes on from."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from onnxslim_llm.artifact.manifest import read_manifest
from onnxslim_llm.artifact.sweep_record import SweepPoint, read_sweep
from onnxslim_llm.compiler import compile as compile_model
from onnxslim_llm.compiler.progress import Silent
from onnxslim_llm.compiler.sweep import SweepResult, sweep
from onnxslim_llm.errors import UsageError

GRID = ("quantize_weights.bits=4,8",)
#: Perplexities of the same tokens by the same model may differ in the order of sums only.
ROUNDING = 1e-5


class Told(Silent):
    """Remembers the stages, how often each advanced, and the notes."""

    def __init__(self) -> None:
        self.stages: list[list[str | int]] = []
        self.notes: list[str] = []

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        self.stages.append([name, 0])

    def advance(self, done: int, label: str = "") -> None:
        self.stages[-1][1] = int(self.stages[-1][1]) + 1

    def note(self, text: str) -> None:
        self.notes.append(text)


def run(model: Path, out: Path, **options: object) -> SweepResult:
    given: dict[str, object] = {"text": model / "text.txt", "bench_rounds": 0, "jobs": 1, "window": 64}
    return sweep(model, out, **{**given, "grid": GRID, "recipes": ["int4-fast"], **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def swept(model: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    """Three points with their artifacts and speeds."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    return run(model, out, recipes=["safe", "int4-fast"], keep="all", bench_rounds=1)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_rows_are_what_the_manifests_say(swept: SweepResult) -> None:
    found = rows(swept.path)
    assert [(r["recipe"], r["quantize_weights.bits"]) for r in found] == [
        ("safe", ""),
        ("int4-fast", "4"),
        ("int4-fast", "8"),
    ]
    for row, point in zip(found, swept.record.points, strict=True):
        assert point.artifact is not None
        manifest = read_manifest(swept.path / point.artifact)
        assert int(row["bytes"]) == manifest.artifact.bytes
        assert float(row["bytes_ratio"]) == manifest.artifact.bytes / manifest.source.bytes
        bits = [entry.options["bits"] for entry in manifest.passes if entry.name == "quantize_weights"]
        assert [row["quantize_weights.bits"]] == ([str(b) for b in bits] or [""])
        assert float(row["prefill_ratio"]) > 0
        assert float(row["decode_ratio"]) > 0


def test_quality_is_what_eval_says(swept: SweepResult, model: Path) -> None:
    from onnxslim_llm.runtime.tokenizer import load_tokenizer
    from onnxslim_llm.verify.quality import evaluate

    point = swept.record.points[1]
    assert point.artifact is not None
    found = evaluate(
        swept.path / point.artifact / "model.onnx",
        model / "text.txt",
        load_tokenizer(model),
        versus=model / "model.onnx",
        window=64,
        threads=1,
    )
    assert found.difference is not None
    assert found.token_sha256 == swept.record.text.token_sha256
    assert point.ppl == pytest.approx(found.ppl, rel=ROUNDING)
    assert point.kld_mean == pytest.approx(found.difference.kld_mean, rel=ROUNDING)
    assert point.top1_agreement == found.difference.top1_agreement


def test_fewer_bits_are_smaller_and_worse_and_the_front_has_what_is_not_beaten(swept: SweepResult) -> None:
    safe, four, eight = swept.record.points
    assert safe.kld_mean is not None
    assert four.kld_mean is not None
    assert eight.kld_mean is not None
    assert safe.bytes is not None
    assert four.bytes is not None
    assert eight.bytes is not None
    assert four.bytes < eight.bytes < safe.bytes
    assert four.kld_mean > eight.kld_mean > safe.kld_mean
    assert [p.pareto for p in swept.record.points] == [True, True, True]


def test_a_recipe_file_reproduces_its_point(swept: SweepResult, model: Path, tmp_path: Path) -> None:
    point = swept.record.points[1]
    assert point.recipe_file is not None
    assert point.artifact is not None
    recipe = swept.path / point.recipe_file
    again = compile_model(model, tmp_path / "again", recipe=recipe, verify="off")
    first = read_manifest(swept.path / point.artifact)
    assert [f.sha256 for f in again.manifest.artifact.files] == [f.sha256 for f in first.artifact.files]


def test_the_same_sweep_measures_nothing_again(swept: SweepResult, model: Path, tmp_path: Path) -> None:
    shutil.copytree(swept.path, tmp_path / "out")
    told = Told()
    again = run(model, tmp_path / "out", recipes=["safe", "int4-fast"], bench_rounds=1, progress=told)
    assert [name for name, _ in told.stages] == ["open"]
    assert again.record.points == swept.record.points
    assert all("(known)" in note for note in told.notes)


def test_a_larger_grid_adds_to_the_folder(swept: SweepResult, model: Path, tmp_path: Path) -> None:
    shutil.copytree(swept.path, tmp_path / "out")
    grown = run(model, tmp_path / "out", grid=["quantize_weights.bits=8,2"], bench_rounds=1)
    assert [p.settings.get("quantize_weights.bits") for p in grown.record.points] == [8, 2, None, 4]
    assert grown.record.points[0] == swept.record.points[2]


def test_another_text_is_refused_in_the_same_folder(swept: SweepResult, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("import os\n" * 50)
    with pytest.raises(UsageError, match="a sweep of another text"):
        run(model, swept.path, text=other)
    assert read_sweep(swept.path / "sweep.json").points == swept.record.points


def test_a_folder_with_other_files_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"the folder holds 'thesis\.tex' and no sweep"):
        run(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_failing_point_is_a_row_and_is_tried_again(model: Path, tmp_path: Path) -> None:
    grid = ["quantize_weights.method=rtn,calibrated"]
    points = run(model, tmp_path / "out", grid=grid).record.points
    assert [p.status for p in points] == ["ok", "failed"]
    assert "needs calibration data" in points[1].reason
    row = rows(tmp_path / "out")[1]
    assert (row["status"], row["bytes"], row["reason"]) == ("failed", "", points[1].reason)
    assert "needs calibration data" in (tmp_path / "out" / "report.html").read_text()
    told = Told()
    run(model, tmp_path / "out", grid=grid, progress=told)
    assert {str(name).split(" ")[0] for name, _ in told.stages} == {"open", "2/2"}


def test_a_sweep_without_any_figures_fails_with_the_first_reason(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs calibration data"):
        run(model, tmp_path / "out", grid=["quantize_weights.method=calibrated"])
    assert read_sweep(tmp_path / "out" / "sweep.json").points[0].status == "failed"


@pytest.mark.slow
def test_gates_let_points_fail_where_they_are_asked_for(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "strict.toml"
    recipe.write_text('extends = "int4-fast"\ngates = "int8"\n')
    grid = ["quantize_weights.bits=2,8"]
    points = run(model, tmp_path / "out", recipes=[recipe], grid=grid, verify="fast").record.points
    assert [p.status for p in points] == ["failed", "ok"]
    assert "gate" in points[0].reason
    assert not (tmp_path / "out" / ".work").exists()


def test_an_interrupted_sweep_keeps_its_rows_and_goes_on(model: Path, tmp_path: Path) -> None:
    class Impatient(Told):
        def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
            super().stage(name, total, unit)
            if name.startswith("2/2 evaluate"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out", progress=Impatient())
    assert [row["quantize_weights.bits"] for row in rows(tmp_path / "out")] == ["4"]
    assert not (tmp_path / "out" / ".work").exists()
    told = Told()
    points = run(model, tmp_path / "out", progress=told).record.points
    assert [p.status for p in points] == ["ok", "ok"]
    assert not any(str(name).startswith("1/2") for name, _ in told.stages)


def test_statistics_are_collected_once(model: Path, tmp_path: Path) -> None:
    told = Told()
    grid = ["prune_weights.sparsity=0.3,0.6"]
    options = {"settings": ["prune_weights.method=wanda"], "calib": model / "calib.txt", "recipes": ["safe"]}
    points = run(model, tmp_path / "out", grid=grid, progress=told, **options).record.points
    assert [p.status for p in points] == ["ok", "ok"]
    collected = [(str(name), times) for name, times in told.stages if str(name).endswith(" calibrate: statistics")]
    advanced = [(name.split(" ")[0], times) for name, times in collected]
    assert [number for number, _ in advanced] == ["1/2", "2/2"]
    assert advanced[0][1] > 0
    assert advanced[1][1] == 0
    assert not (tmp_path / "out" / ".statistics").exists()


def test_only_the_front_is_kept(model: Path, tmp_path: Path) -> None:
    grid = ["quantize_weights.method=rtn,search", "quantize_weights.bits=4"]
    points = run(model, tmp_path / "out", grid=grid, keep="pareto").record.points
    kept = {p.artifact for p in points if p.artifact}
    assert sum(p.pareto for p in points) == 1
    assert kept == {f"artifacts/{p.name}" for p in points if p.pareto}
    assert {f"artifacts/{p.name}" for p in (tmp_path / "out" / "artifacts").iterdir()} == kept


def test_a_point_without_its_artifact_is_made_again_where_it_is_wanted(model: Path, tmp_path: Path) -> None:
    grid = ["quantize_weights.bits=8"]
    assert run(model, tmp_path / "out", grid=grid).record.points[0].artifact is None
    (point,) = run(model, tmp_path / "out", grid=grid, keep="all").record.points
    assert point.artifact is not None
    assert (tmp_path / "out" / point.artifact / "manifest.json").is_file()


def test_json_is_plain_and_says_what_was_measured(swept: SweepResult, model: Path) -> None:
    data = json.loads((swept.path / "sweep.json").read_text())
    assert data["text"]["window"] == 64
    assert data["source"]["bytes"] == (model / "model.onnx").stat().st_size
    assert SweepPoint.model_validate(data["points"][0]) == swept.record.points[0]


def test_no_decoder_is_refused(model: Path, tmp_path: Path) -> None:
    import onnx
    from onnx import parser

    (tmp_path / "net").mkdir()
    shutil.copy(model / "tokenizer.json", tmp_path / "net")
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }'
    onnx.save(parser.parse_model(text), tmp_path / "net" / "model.onnx")
    with pytest.raises(UsageError, match="a text cannot be fed to this model"):
        run(tmp_path / "net", tmp_path / "out", text=model / "text.txt")
