"""manifest.json as the contract has it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from onnxslim_llm.artifact.manifest import Manifest, created_now, json_schema, read_manifest
from onnxslim_llm.errors import ModelError

Fill = Callable[[Path, int], Manifest]

ROOT = Path(__file__).resolve().parents[2]


def test_has_every_key_of_the_contract(tmp_path: Path, fill: Fill) -> None:
    fill(tmp_path, 1)
    found = json.loads((tmp_path / "manifest.json").read_text())
    keys = "schema_version tool created source artifact target recipe environment passes verify quality cost"
    assert set(keys.split()) <= found.keys()
    assert found["schema_version"] == "1.0"
    assert found["tool"] == {"name": "onnxslim-llm", "version": "0.1.0"}
    assert {"path", "sha256", "bytes", "opset", "producer", "ops"} <= found["source"].keys()
    assert {"files", "bytes", "opset", "ops"} <= found["artifact"].keys()
    assert {"path", "sha256", "bytes"} <= found["artifact"]["files"][0].keys()
    assert {"python", "onnxruntime", "cpu_features", "threads"} <= found["environment"].keys()
    names = "name options seconds changed skipped_count skipped nodes bytes rolled_back detail"
    assert set(names.split()) <= found["passes"][0].keys()
    assert found["passes"][0]["skipped"] == [{"where": "/norm", "reason": "one-dimensional"}]
    assert {"seconds", "peak_rss_bytes", "bytes_read", "bytes_written"} <= found["cost"].keys()
    gate = found["verify"]["gates"][0]
    assert (gate["limit"], gate["value"], gate["ok"]) == (0.99, 0.5, False)


def test_reads_back_what_it_wrote(tmp_path: Path, fill: Fill) -> None:
    written = fill(tmp_path, 1)
    assert read_manifest(tmp_path) == written
    assert read_manifest(tmp_path / "manifest.json").dumps() == written.dumps()
    assert [gate.name for gate in written.failed_gates] == ["cosine"]


def test_figures_that_are_not_finite_are_null(tmp_path: Path, fill: Fill) -> None:
    fill(tmp_path, 1)
    text = (tmp_path / "manifest.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["verify"]["sqnr_db"] is None


def test_fields_of_a_later_version_survive(tmp_path: Path, fill: Fill) -> None:
    data = json.loads(fill(tmp_path, 1).dumps())
    data["schema_version"] = "1.7"
    data["energy"] = {"joules": 3}
    again = Manifest.model_validate(data)
    assert json.loads(again.dumps())["energy"] == {"joules": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Invalid JSON"),
        ('{"schema_version": "2.0"}', "not a manifest of schema version 1"),
        ("[]", "not a manifest of schema version 1"),
    ],
)
def test_refuses_what_is_no_manifest(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        read_manifest(tmp_path)


def test_says_when_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file") as caught:
        read_manifest(tmp_path)
    assert caught.value.where == str(tmp_path / "manifest.json")


def test_time_respects_source_date_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert created_now() == "2023-11-14T22:13:20Z"
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert created_now() > "2024"


def test_published_schema_is_current() -> None:
    """Run `python -m onnxslim_llm.artifact.manifest > docs/manifest.schema.json` after a change of the models."""
    assert (ROOT / "docs" / "manifest.schema.json").read_text() == json_schema()
