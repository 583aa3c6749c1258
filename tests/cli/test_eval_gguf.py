"""eval of GGUF models beside ONNX ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def gguf_file(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    path = tmp_path_factory.mktemp("gguf") / "sample.gguf"
    script = ROOT / "benchmarks" / "quality" / "gguf_peer.py"
    subprocess.run([sys.executable, script, sample_dir, "-o", path, "--type", "Q8_0"], check=True, cwd=ROOT)
    return path


def test_both_on_the_same_tokens(cli: Run, sample_dir: Path, gguf_file: Path) -> None:
    models = [sample_dir, gguf_file]
    text = ["--text", sample_dir / "heldout.txt", "--max-tokens", 200, "--window", 64, "--threads", 1]
    done = cli("eval", *models, "--vs", sample_dir, *text, "--json")
    assert done.returncode == 0, done.stderr
    same, q8 = json.loads(done.stdout)["models"]
    assert same["token_sha256"] == q8["token_sha256"]
    assert same["kld_mean"] == 0
    assert 0 < q8["kld_mean"] < 0.01  # 8 bits
    assert q8["bytes"] == gguf_file.stat().st_size
    assert len(q8["greedy_first_divergence"]) > 0
    table = cli("eval", *models, "--vs", sample_dir, *text)
    assert gguf_file.name in table.stdout


def test_without_the_library_the_extra_is_named(sample_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('No module named llama_cpp')")  # as if not installed
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from onnxslim_llm.cli import main; sys.exit(main())"
    arguments = ["eval", str(tmp_path / "model.gguf"), "--vs", str(sample_dir)]
    arguments += ["--text", str(sample_dir / "heldout.txt"), "--max-tokens", "64"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert "onnxslim-llm[gguf]" in done.stderr
    assert "Traceback" not in done.stderr
