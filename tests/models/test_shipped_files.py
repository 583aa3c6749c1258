"""The files of the sample model agree with each other and fit the repository."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

MAX_BYTES = 32_000_000  # what the whole of models/ may add to a clone
BLOCK = 256  # the largest block of any common weight format; hidden and FFN sizes are multiples of it


@pytest.fixture(scope="module")
def proto(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "model.onnx")


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def test_safetensors_hold_exactly_the_tensors_of_the_config(
    config: dict[str, Any], weights: dict[str, NDArray[Any]]
) -> None:
    assert {name: tensor.shape for name, tensor in weights.items()} == expected_shapes(config)


def test_sizes_suit_every_block_format(config: dict[str, Any]) -> None:
    assert config["hidden_size"] % BLOCK == config["intermediate_size"] % BLOCK == 0
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["tie_word_embeddings"] is True


def test_onnx_weights_are_exactly_the_bfloat16_values(proto: onnx.ModelProto, weights: dict[str, NDArray[Any]]) -> None:
    """Every trained tensor is in the graph bit for bit, as it is or transposed, and no other large one is."""
    stored = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    large = {name: a for name, a in stored.items() if a.dtype == np.float32 and a.size >= BLOCK}
    matched: set[str] = set()
    for name, tensor in weights.items():
        want = tensor.astype(np.float32)
        same = {n for n, a in large.items() if np.array_equal(a, want) or np.array_equal(a, want.T)}
        assert same, f"{name} is not in model.onnx"
        matched |= same
    assert matched == set(large)


def test_one_decoder_with_free_dimensions(folder: Path, proto: onnx.ModelProto, config: dict[str, Any]) -> None:
    assert [p.name for p in folder.glob("*.onnx")] == ["model.onnx"]
    layers = config["num_hidden_layers"]
    kinds = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
    inputs = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.input}
    assert list(inputs) == ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{k}" for k in kinds)]
    assert [v.name for v in proto.graph.output] == ["logits", *(f"present.{k}" for k in kinds)]
    assert inputs["input_ids"] == ["batch_size", "sequence_length"]
    shape = ["batch_size", config["num_key_value_heads"], "past_sequence_length", config["head_dim"]]
    assert inputs["past_key_values.0.key"] == shape
    assert {o.domain for o in proto.opset_import} <= {"", "ai.onnx"}


def test_side_files_agree_with_the_config(folder: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert len(tokenizer["model"]["vocab"]) == config["vocab_size"]
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    for name in ("bos", "eos", "pad"):
        assert special[settings[f"{name}_token"]] == config[f"{name}_token_id"] == generation[f"{name}_token_id"]
    assert settings["model_max_length"] == config["max_position_embeddings"]


def test_size_of_everything_in_models(folder: Path) -> None:
    root = folder.parents[1]
    listed = subprocess.run(["git", "ls-files", "-z", "models"], cwd=root, capture_output=True, check=False)
    names = [name for name in listed.stdout.decode().split("\0") if name]
    files = [root / name for name in names] or [p for p in folder.parent.rglob("*") if "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files if p.is_file()) <= MAX_BYTES
