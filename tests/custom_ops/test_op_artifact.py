"""From a model to an artifact with our operators, into other people's runtimes, and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from op_models import needs_library

import onnxslim_llm as osl
from onnxslim_llm.custom_ops import ops
from onnxslim_llm.errors import ResourceError
from onnxslim_llm.targets import get_target

pytestmark = [needs_library, pytest.mark.slow]

SAMPLE = Path(__file__).resolve().parents[2] / "models" / "stdlib-llama"
PROMPT = [1, 5, 9, 20]
TOKENS = 24
#: Not what both targets would make of a budget of bits: they differ in the widths that they can store.
SAME_WIDTHS = ["quantize_weights.target_bits=0"]


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "ops"
    return osl.compile(SAMPLE, folder, target="ort-cpu-ops", bundle_ops=True, settings=SAME_WIDTHS).path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "plain"
    return osl.compile(SAMPLE, folder, target="ort-cpu", settings=SAME_WIDTHS).path


def library_in_config(folder: Path) -> str | None:
    config = json.loads((folder / "genai_config.json").read_text())
    found: str | None = config["model"]["decoder"]["session_options"].get("custom_ops_library")
    return found


def test_the_library_lies_beside_the_model(bundled: Path) -> None:
    manifest = json.loads((bundled / "manifest.json").read_text())
    assert ops.LIBRARY_NAME in [file["path"] for file in manifest["artifact"]["carried"]]
    library = ops.library_path()
    assert library is not None
    assert (bundled / ops.LIBRARY_NAME).read_bytes() == library.read_bytes()
    assert library_in_config(bundled) == ops.LIBRARY_NAME
    assert manifest["artifact"]["ops"]["onnxslim_llm.ops::MatMulPacked"] > 0


def test_genai_generates_with_the_bundled_library(bundled: Path, plain: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")

    def generate(folder: Path) -> list[int]:
        model = genai.Model(str(folder))
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=len(PROMPT) + TOKENS, do_sample=False)
        generator = genai.Generator(model, params)
        generator.append_tokens(np.array([PROMPT], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)]

    found = generate(bundled)
    assert len(found) == len(PROMPT) + TOKENS
    assert found[: len(PROMPT) + 1] == generate(plain)[: len(PROMPT) + 1]


def test_an_artifact_is_converted_back_with_the_same_bytes(bundled: Path, plain: Path, tmp_path: Path) -> None:
    back = osl.compile(bundled, tmp_path / "back", target="ort-cpu").path
    assert (back / "model.onnx.data").read_bytes() == (plain / "model.onnx.data").read_bytes()
    assert library_in_config(back) is None
    assert not (back / ops.LIBRARY_NAME).exists()


def test_any_artifact_is_taken_in(bundled: Path, plain: Path, tmp_path: Path) -> None:
    taken = osl.compile(plain, tmp_path / "taken", target="ort-cpu-ops").path
    assert (taken / "model.onnx.data").read_bytes() == (bundled / "model.onnx.data").read_bytes()
    notes = json.loads((taken / "manifest.json").read_text())["notes"]
    assert any(ops.LIBRARY_NAME in note for note in notes)


def test_a_target_without_our_operators_gets_no_library(tmp_path: Path) -> None:
    result = osl.compile(SAMPLE, tmp_path / "plain", target="ort-cpu", bundle_ops=True)
    assert not (result.path / ops.LIBRARY_NAME).exists()
    assert "--bundle-ops: the artifact has none of our operators" in result.manifest.notes


def test_a_library_that_was_not_built_is_found_missing_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ops, "LIBRARY_NAME", "libno_such_library.so")
    with pytest.raises(ResourceError, match=r"libno_such_library.so was not built here"):
        osl.compile(SAMPLE, tmp_path / "artifact", target="ort-cpu-ops", bundle_ops=True)
    assert not (tmp_path / "artifact").exists()
    assert get_target("ort-cpu-ops").installed() == (False, "libno_such_library.so was not built here")
