"""A random decoder with the sample model's tokenizer, and a text."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
from reference_decoder import DecoderSpec, build

_TEXT_CHARACTERS = 1500
_CALIBRATION_CHARACTERS = 6000


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, sample_dir: Path) -> Path:
    """A folder with model.onnx of 0.3 M parameters, tokenizer.json, text.txt and calib.txt."""
    folder = tmp_path_factory.mktemp("decoder")
    onnx.save(build(DecoderSpec(vocab=2048)), folder / "model.onnx")
    shutil.copy(sample_dir / "tokenizer.json", folder)
    (folder / "text.txt").write_text((sample_dir / "heldout.txt").read_text()[:_TEXT_CHARACTERS])
    (folder / "calib.txt").write_text((sample_dir / "calib.txt").read_text()[:_CALIBRATION_CHARACTERS])
    return folder
