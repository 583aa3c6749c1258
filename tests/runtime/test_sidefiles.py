from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onnxslim_llm.errors import ModelError
from onnxslim_llm.runtime.sidefiles import SideFiles


def write(folder: Path, **files: Any) -> SideFiles:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return SideFiles.of(folder)


def test_nothing_there(tmp_path: Path) -> None:
    assert SideFiles.of(tmp_path) == SideFiles()


def test_all_files_together(tmp_path: Path) -> None:
    side = write(
        tmp_path,
        generation_config={"eos_token_id": [3, 5]},
        config={"eos_token_id": 3, "max_position_embeddings": 512},
        genai_config={"model": {"eos_token_id": 9, "context_length": 100}},
        tokenizer_config={"eos_token": "</s>", "model_max_length": 50},
    )
    assert side == SideFiles((3, 5, 9), "</s>", 512)


def test_lengths_without_a_meaning_are_left_out(tmp_path: Path) -> None:
    assert write(tmp_path, tokenizer_config={"model_max_length": 1e30}).context_length is None
    assert write(tmp_path, tokenizer_config={"model_max_length": 256}).context_length == 256


def test_null_ends_are_left_out(tmp_path: Path) -> None:
    assert write(tmp_path, config={"eos_token_id": None}, tokenizer_config={"eos_token": None}) == SideFiles()


@pytest.mark.parametrize("text", ["{", "[1]", '"x"'])
def test_broken_files_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        SideFiles.of(tmp_path)
    assert caught.value.where.endswith("config.json")
