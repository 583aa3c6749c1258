"""What every test may use."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Machines that run this are shared: an example that takes long says nothing about the code.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")

ROOT = Path(__file__).resolve().parent.parent

# A shell that runs the tests in the background has Ctrl-C ignored, and processes started here would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The generator of random decoders serves benchmarks and tests: `from reference_decoder import DecoderSpec, build`.
sys.path.insert(0, str(ROOT / "benchmarks"))
# The zoo of exported models serves the tests of several folders: `from zoo.access import model_path`.
sys.path.insert(0, str(ROOT / "tests"))


@pytest.fixture(scope="session")
def sample_dir() -> Path:
    """The trained sample model: model.onnx, tokenizer.json, heldout.txt, calib.txt and its config files."""
    folder = Path(os.environ.get("ONNXSLIM_SAMPLE", ROOT / "models" / "stdlib-llama"))
    assert (folder / "model.onnx").is_file(), f"the sample model is not in {folder}"
    return folder
