"""Calibration data as a compile takes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from onnxslim_llm.compiler.calibration import SELF, Calibrator
from onnxslim_llm.compiler.progress import Silent
from onnxslim_llm.errors import UsageError


@pytest.fixture
def sample(sample_dir: Path) -> Path:
    return sample_dir / "model.onnx"


def _calibrator(sample: Path, data: Path | None, folder: Path) -> Calibrator:
    return Calibrator(sample, data, folder / "statistics", 1, Silent())


def test_without_data_there_are_no_statistics(sample: Path, tmp_path: Path) -> None:
    assert _calibrator(sample, None, tmp_path).statistics() is None


def test_text_and_token_lines_give_the_same(sample: Path, tmp_path: Path) -> None:
    from onnxslim_llm.runtime.tokenizer import load_tokenizer

    text = "def read(path):\n    return open(path).read()\n" * 40
    ids = load_tokenizer(sample.parent).encode(text)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "c.jsonl").write_text(json.dumps({"tokens": ids}) + "\n\n")
    squares = []
    for name in ("a.txt", "b.jsonl", "c.jsonl"):
        statistics = _calibrator(sample, tmp_path / name, tmp_path / name.replace(".", "")).statistics()
        assert statistics is not None
        stored = statistics.of_tensor(statistics.taps[0].tensor)
        assert stored is not None
        squares.append(stored.load().fit.square)
    assert np.array_equal(squares[0], squares[1])
    assert np.array_equal(squares[0], squares[2])


@pytest.mark.slow
def test_the_model_writes_its_own_text(sample: Path, tmp_path: Path) -> None:
    calibrator = _calibrator(sample, Path(SELF), tmp_path)
    statistics = calibrator.statistics()
    assert statistics is not None
    assert all(tap.size > 0 for tap in statistics.taps)
    calibrator.discard()
    assert not (tmp_path / "statistics").exists()


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        ("empty.txt", "", "no tokens"),
        ("bad.jsonl", "{", "line 1 is no JSON"),
        ("other.jsonl", '{"words": 1}', "neither text nor tokens"),
        ("ids.jsonl", '{"tokens": [1, 999999]}', "token id 999999"),
        ("missing.txt", None, "no such calibration file"),
    ],
)
def test_data_that_do_not_fit_are_refused(
    sample: Path, tmp_path: Path, name: str, content: str | None, wrong: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=wrong):
        _calibrator(sample, tmp_path / name, tmp_path).statistics()
