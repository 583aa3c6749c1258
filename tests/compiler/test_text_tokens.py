"""A vocabulary pruned to the user's text, from the command's point of view."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from reference_decoder import DecoderSpec, build

from onnxslim_llm.artifact.manifest import Manifest
from onnxslim_llm.compiler import compile as compile_model
from onnxslim_llm.compiler.calibration import Calibrator
from onnxslim_llm.compiler.progress import Silent
from onnxslim_llm.compiler.text_tokens import TextTokens
from onnxslim_llm.errors import UsageError
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.generate import generate
from onnxslim_llm.runtime.session import open_session
from onnxslim_llm.runtime.tokenizer import load_tokenizer
from onnxslim_llm.verify.quality import Quality, evaluate

RECIPE = 'extends = "safe"\ngates = "int4"\n[[passes]]\nname = "prune_vocabulary"\n'
#: The same sums in another order.
ROUNDING = 1e-6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, sample_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    onnx.save(build(DecoderSpec(vocab=2048)), folder / "model.onnx")
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copy(sample_dir / name, folder)
    (folder / "calib.txt").write_text((sample_dir / "calib.txt").read_text()[:4000])
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def artifact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    out = tmp_path_factory.mktemp("artifact") / "out"
    result = compile_model(model, out, recipe=model / "recipe.toml", calib=model / "calib.txt")
    return result.path, result.manifest


def measured(path: Path, model: Path, text: Path) -> Quality:
    files = path / "model.onnx", model / "model.onnx"
    return evaluate(files[0], text, load_tokenizer(model), versus=files[1], window=64, threads=1)


def test_what_is_kept_is_what_it_was(artifact: tuple[Path, Manifest], model: Path) -> None:
    path, manifest = artifact
    assert manifest.verify is not None
    assert manifest.verify.kl_mean is not None
    assert manifest.verify.kl_mean < ROUNDING
    found = measured(path, model, model / "calib.txt")
    assert found.left_out == 0
    assert found.difference is not None
    assert found.difference.kld_mean < ROUNDING
    assert found.difference.top1_agreement == 1


def test_the_map_lies_beside_the_model(artifact: tuple[Path, Manifest], model: Path) -> None:
    path, manifest = artifact
    data = json.loads((path / "token_map.json").read_text())
    ids = load_tokenizer(model).encode((model / "calib.txt").read_text())
    special = json.loads((model / "generation_config.json").read_text())["eos_token_id"]
    assert data["vocabulary"] == 2048
    assert len(data["kept"]) % 32 == 0
    assert {*ids, special} <= set(data["kept"])
    assert "token_map.json" in {file.path for file in manifest.artifact.carried}
    detail = next(entry.detail for entry in manifest.passes if entry.name == "prune_vocabulary")
    assert detail["tokens"] == [2048, len(data["kept"])]


def test_tokens_that_are_left_out_count_nowhere(artifact: tuple[Path, Manifest], model: Path, sample_dir: Path) -> None:
    path, _ = artifact
    text = path.parent / "other.txt"
    text.write_text((sample_dir / "heldout.txt").read_text()[:2000])
    kept = json.loads((path / "token_map.json").read_text())["kept"]
    ids = load_tokenizer(model).encode(text.read_text())
    found = measured(path, model, text)
    gone = int((~np.isin(ids[1:], kept)).sum())
    assert gone > 0
    assert found.left_out == gone
    assert found.tokens == len(ids) - 1 - gone
    assert found.to_json()["tokens_left_out"] == gone
    assert found.bits_per_byte is None
    assert np.isfinite(found.ppl)


def test_only_kept_tokens_are_written(artifact: tuple[Path, Manifest]) -> None:
    path, _ = artifact
    kept = set(json.loads((path / "token_map.json").read_text())["kept"])
    reader = DecoderRunner(open_session(path / "model.onnx", threads=1))
    written = list(generate(reader, [min(kept)], max_new_tokens=20))
    assert len(written) == 20
    assert set(written) <= kept


def test_without_text_there_is_nothing_to_keep(model: Path, tmp_path: Path) -> None:
    for calib in (None, "self"):
        with pytest.raises(UsageError, match="nothing says which tokens are needed"):
            compile_model(model, tmp_path / "out", recipe=model / "recipe.toml", calib=calib, verify="off")


def _source(model: Path, data: Path | None, folder: Path) -> TextTokens:
    return TextTokens(Calibrator(model / "model.onnx", data, folder / "statistics", 1, Silent()))


def test_all_files_of_a_folder_are_counted(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"tokens": [1, 2, 2]}\n')
    (tmp_path / "b.jsonl").write_text('{"tokens": [5]}\n')
    counts = _source(model, tmp_path, tmp_path).counts("input_ids", 8)
    assert counts is not None
    assert counts.tolist() == [0, 1, 2, 0, 0, 1, 0, 0]


def test_arrays_are_counted_by_the_name_of_the_input(model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input_ids=np.array([[3, 3, 1]]), attention_mask=np.ones((1, 3), np.int64))
    source = _source(model, tmp_path / "a.npz", tmp_path)
    counts = source.counts("input_ids", 4)
    assert counts is not None
    assert counts.tolist() == [0, 1, 0, 2]
    with pytest.raises(UsageError, match="token id 3 lies outside of the model's vocabulary of 2"):
        source.counts("input_ids", 2)
    with pytest.raises(UsageError, match="the input 'tokens' cannot be read"):
        source.counts("tokens", 4)


def test_special_tokens_come_from_all_side_files(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"bos_token_id": 4, "eos_token_id": [5, 6], "pad_token_id": null}')
    (tmp_path / "genai_config.json").write_text('{"model": {"eos_token_id": 9}}')
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"id": 11, "content": "<x>"}, {"content": "<y>"}]}')
    (tmp_path / "generation_config.json").write_text("no json")
    shutil.copy(model / "model.onnx", tmp_path)
    assert _source(tmp_path, None, tmp_path).special() == (4, 5, 6, 9, 11)
