"""The verbs that work on text, with the sample model."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx.parser
import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

pytest.importorskip("tokenizers")


def test_generate_streams_text_that_starts_anew_each_time(cli: Run, sample_dir: Path) -> None:
    arguments = ["generate", sample_dir, "--prompt", "def main(", "-n", 12]
    done = cli(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("note: ")
    assert "tokens/s" in done.stderr
    assert cli(*arguments, "-q").stdout == done.stdout
    assert cli(*arguments, "-q").stderr == ""
    found = json.loads(cli(*arguments, "--json").stdout)
    assert found["text"] + "\n" == done.stdout
    assert found["prompt"] == "def main("
    assert len(found["token_ids"]) == found["new_tokens"] <= 12


def test_generate_reads_the_prompt_from_stdin(cli: Run, sample_dir: Path) -> None:
    arguments = ["generate", sample_dir, "-n", 8, "--json", "--prompt"]
    piped = json.loads(cli(*arguments, "-", input="import os\n").stdout)
    given = json.loads(cli(*arguments, "import os\n").stdout)
    assert piped["token_ids"] == given["token_ids"]


def test_sampling_is_reproducible(cli: Run, sample_dir: Path) -> None:
    arguments = ["generate", sample_dir, "--prompt", "class ", "-n", 24, "--temperature", 1.0, "--json", "--seed"]
    first, again, other = (json.loads(cli(*arguments, seed).stdout)["token_ids"] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--temperature", -1], "temperature"), (["--top-p", 0], "top-p"), (["--tokenizer", "nowhere"], "no tokenizer")],
)
def test_generate_refuses_nonsense(cli: Run, sample_dir: Path, arguments: list[object], message: str) -> None:
    done = cli("generate", sample_dir, "--prompt", "x", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_generate_with_a_model_that_is_no_decoder(cli: Run, tmp_path: Path) -> None:
    """The model is what is wrong, not that it has no tokenizer."""
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[n] x) => (float[n] y) { y = Neg(x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    done = cli("generate", "model.onnx", "--prompt", "x")
    assert done.returncode == 3
    assert "not a decoder" in done.stderr


def test_eval_of_a_model_against_itself(cli: Run, sample_dir: Path) -> None:
    text = sample_dir / "heldout.txt"
    arguments = ["eval", sample_dir, "--text", text, "--vs", sample_dir, "--max-tokens", 300, "--window", 128]
    found = json.loads(cli(*arguments, "--json").stdout)
    assert found["tokens"] == 299
    assert found["ppl_artifact"] == found["ppl_source"] > 1
    assert found["kld_mean"] == found["kld_p99"] == 0
    assert found["top1_agreement"] == 1
    table = cli(*arguments)
    assert table.returncode == 0
    assert "perplexity of B" in table.stdout
    assert f"{found['ppl_artifact']:.4g}" in table.stdout


def test_eval_without_a_text_is_told(cli: Run, sample_dir: Path) -> None:
    done = cli("eval", sample_dir, "--text", "nowhere.txt")
    assert done.returncode == 2
    assert "nowhere.txt" in done.stderr
