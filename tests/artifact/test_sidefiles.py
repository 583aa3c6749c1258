"""What travels with a model, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxslim_llm.artifact import sidefiles
from onnxslim_llm.artifact.sidefiles import carry_side_files

SIDE = ["chat_template.jinja", "config.json", "genai_config.json", "tokenizer.json", "tokenizer.model"]
OTHERS = ["model.onnx", "model.onnx.data", "model.onnx_data", "model.safetensors", "pytorch_model.bin", "x.pt"]
OTHERS += ["model.safetensors.index.json", "README.md", "corpus.txt", "train.py"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "subfolder").mkdir(parents=True)
    for name in [*SIDE, *OTHERS, "LICENSE", "manifest.json", "report.html", ".gitattributes"]:
        (folder / name).write_text(name)
    return folder


def test_a_folder_gives_configuration_and_licence(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").mkdir()
    names, notes = carry_side_files(source, tmp_path / "out", only_known=False)
    assert names == ["LICENSE", *SIDE]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["LICENSE", *SIDE]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer.json"
    assert notes == []


def test_beside_a_file_only_well_known_names_are_taken(tmp_path: Path, source: Path) -> None:
    (source / "tax return.json").write_text("private")
    (tmp_path / "out").mkdir()
    names, _ = carry_side_files(source, tmp_path / "out", only_known=True)
    assert names == SIDE


def test_links_become_files(tmp_path: Path, source: Path) -> None:
    (tmp_path / "blob").write_text("content")
    (source / "vocab.json").symlink_to(tmp_path / "blob")
    (tmp_path / "out").mkdir()
    carry_side_files(source, tmp_path / "out", only_known=False)
    assert not (tmp_path / "out" / "vocab.json").is_symlink()
    assert (tmp_path / "out" / "vocab.json").read_text() == "content"


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("ours")
    names, _ = carry_side_files(source, tmp_path / "out", only_known=False)
    assert "config.json" not in names
    assert (tmp_path / "out" / "config.json").read_text() == "ours"


def test_a_large_file_stays_behind_with_a_note(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidefiles, "SIDE_FILE_LIMIT", 20)
    (source / "vocab.json").write_text("x" * 21)
    (tmp_path / "out").mkdir()
    names, notes = carry_side_files(source, tmp_path / "out", only_known=False)
    assert "vocab.json" not in names
    assert notes == ["vocab.json is not carried along: 21 bytes, the limit is 20"]
