"""Artifacts for other people's programs: compiled once for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxslim_llm.compiler import compile as compile_model
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.generate import generate
from onnxslim_llm.targets import get_target

#: Written by our own generate and by the client; enough for a wrong cache or position to show.
NEW_TOKENS = 24


@dataclass(frozen=True)
class Artifact:
    """A compiled model, with what our own generate says to a prompt."""

    folder: Path
    prompt: list[int]
    expected: list[int]


Compiled = Callable[..., Artifact]
Smaller = Callable[[list[str], str], Artifact]

#: Characters of the calibration text: enough to choose heads and blocks by, and quick.
CALIBRATION = 12_000


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Compile a model, once per set of options, and generate from it."""
    known: dict[tuple[object, ...], Artifact] = {}

    def make(source: Path, target: str, recipe: str, **options: Any) -> Artifact:
        key = (source, target, recipe, *sorted(options.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp("artifact") / "out"
            compile_model(source, folder, target=target, recipe=recipe, verify="off", **options)
            runner = DecoderRunner(get_target(target).open(folder / "model.onnx", threads=1))
            # No special token in the prompt: clients make masks of these by themselves.
            prompt = np.random.default_rng(11).integers(5, min(runner.vocab, 250), 9).tolist()
            known[key] = Artifact(folder, prompt, list(generate(runner, prompt, max_new_tokens=NEW_TOKENS)))
        return known[key]

    return make


@pytest.fixture
def smaller(compiled: Compiled, sample_dir: Path, tmp_path: Path) -> Smaller:
    """Compile the sample model with passes behind those of the recipe "safe"."""

    def make(passes: list[str], target: str) -> Artifact:
        steps = "".join(f'[[passes]]\nname = "{name}"\n' for name in passes)
        recipe, text = tmp_path / "smaller.toml", tmp_path / "calib.txt"
        recipe.write_text(f'extends = "safe"\ngates = "int4"\n{steps}')
        text.write_text((sample_dir / "calib.txt").read_text(encoding="utf-8")[:CALIBRATION], encoding="utf-8")
        return compiled(sample_dir, target, str(recipe), calib=text)

    return make
