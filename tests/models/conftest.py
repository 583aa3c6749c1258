"""The shipped sample model, and a small session helper that knows nothing of the project's own runtime."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "models" / "stdlib-llama"
if str(ROOT) not in sys.path:  # the scripts in models/ are not part of the installed package
    sys.path.append(str(ROOT))

Array = NDArray[Any]
Step = Callable[..., tuple[Array, dict[str, Array]]]


@pytest.fixture(scope="session")
def folder() -> Path:
    return FOLDER


@pytest.fixture(scope="session")
def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def weights(folder: Path) -> dict[str, Array]:
    """Tensors of model.safetensors by name, bfloat16, read by its specification: length, JSON header, data."""
    raw = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        assert entry["dtype"] == "BF16", name
        begin, end = (start + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(raw[begin:end], dtype=ml_dtypes.bfloat16).reshape(entry["shape"])
    return tensors


@pytest.fixture(scope="session")
def step(folder: Path, config: dict[str, Any]) -> Step:
    """``step(ids, mask, positions, cache={})`` -> logits and the new cache, through ONNX Runtime as shipped."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    layers, kv_heads, head_dim = config["num_hidden_layers"], config["num_key_value_heads"], config["head_dim"]
    names = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]

    def run(
        ids: Array, mask: Array, positions: Array, cache: dict[str, Array] | None = None
    ) -> tuple[Array, dict[str, Array]]:
        empty = np.zeros((len(ids), kv_heads, 0, head_dim), np.float32)
        past = {f"past_key_values.{n}": (cache or {}).get(n, empty) for n in names}
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
        logits, *present = session.run(["logits", *(f"present.{n}" for n in names)], feeds)
        return logits, dict(zip(names, present, strict=True))

    return run
