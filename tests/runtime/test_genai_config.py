"""What genai_config.json says, and when there is none. That genai accepts it is tested in tests/clients."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxslim_llm.runtime.genai_config import ASSUMED_CONTEXT, make_genai_config
from onnxslim_llm.runtime.signature import CachePair, DecoderSignature, Extra

INT64, FLOAT = np.dtype(np.int64), np.dtype(np.float32)


def cache(past: str, present: str, shape: tuple[int | None, ...] = (None, 2, None, 16)) -> CachePair:
    return CachePair(past, present, FLOAT, shape, 0, 2)


def layers(count: int = 2, past: str = "past_key_values", present: str = "present") -> tuple[CachePair, ...]:
    return tuple(
        cache(f"{past}.{i}.{part}", f"{present}.{i}.{part}") for i in range(count) for part in ("key", "value")
    )


def signature(**changes: Any) -> DecoderSignature:
    whole = DecoderSignature(
        ids="input_ids",
        ids_dtype=INT64,
        logits="logits",
        mask="attention_mask",
        mask_dtype=INT64,
        positions="position_ids",
        positions_dtype=INT64,
        caches=layers(),
        vocab=300,
    )
    return replace(whole, **changes)


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def made(folder: Path, decoder: DecoderSignature | None = None, *, in_place: bool = False) -> dict[str, Any]:
    content, _ = make_genai_config(decoder or signature(), folder, filename="model.onnx", in_place=in_place)
    assert content is not None
    return content


def refused(folder: Path, decoder: DecoderSignature) -> str:
    content, notes = make_genai_config(decoder, folder, filename="model.onnx", in_place=False)
    assert content is None
    (note,) = notes
    return note


def test_everything_comes_from_the_graph_and_the_side_files(tmp_path: Path) -> None:
    write(
        tmp_path,
        config={"vocab_size": 999, "max_position_embeddings": 64, "num_attention_heads": 4, "hidden_size": 32},
        generation_config={"eos_token_id": [2, 3], "bos_token_id": 1, "do_sample": True, "top_p": 0.9},
    )
    content = made(tmp_path)
    assert content["model"]["type"] == "decoder"
    assert content["model"]["vocab_size"] == 300, "the graph knows better than config.json"
    assert content["model"]["context_length"] == 64
    assert content["model"]["eos_token_id"] == [2, 3]
    assert "pad_token_id" not in content["model"]
    decoder = content["model"]["decoder"]
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (2, 2, 16)
    assert (decoder["num_attention_heads"], decoder["hidden_size"]) == (4, 32)
    assert decoder["inputs"] == {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "position_ids": "position_ids",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    assert decoder["outputs"]["present_value_names"] == "present.%d.value"
    search = content["search"]
    assert (search["max_length"], search["do_sample"], search["top_p"]) == (64, True, 0.9)
    assert search["past_present_share_buffer"] is False


def test_inputs_that_the_graph_does_not_have_are_not_named(tmp_path: Path) -> None:
    content = made(tmp_path, signature(mask=None, mask_dtype=None, positions=None, positions_dtype=None))
    assert set(content["model"]["decoder"]["inputs"]) == {"input_ids", "past_key_names", "past_value_names"}


def test_a_context_that_nobody_knows_is_assumed_and_told(tmp_path: Path) -> None:
    content, notes = make_genai_config(signature(), tmp_path, filename="model.onnx", in_place=False)
    assert content is not None
    assert content["model"]["context_length"] == ASSUMED_CONTEXT
    assert len(notes) == 1
    assert "context length" in notes[0]


@pytest.mark.parametrize("past", ["past_key_values", "kv0_cache"])
def test_numbers_in_names_other_than_the_layer(tmp_path: Path, past: str) -> None:
    inputs = made(tmp_path, signature(caches=layers(12, past=past)))["model"]["decoder"]["inputs"]
    assert inputs["past_key_names"] == f"{past}.%d.key"
    assert inputs["past_value_names"] == f"{past}.%d.value"


def test_all_keys_before_all_values(tmp_path: Path) -> None:
    caches = layers(3)
    decoder = made(tmp_path, signature(caches=caches[1::2] + caches[0::2]))["model"]["decoder"]
    assert decoder["inputs"]["past_key_names"] == "past_key_values.%d.key"
    assert decoder["outputs"]["present_value_names"] == "present.%d.value"


def test_the_sources_own_is_kept_and_corrected(tmp_path: Path) -> None:
    own = {
        "model": {
            "type": "phi3",
            "vocab_size": 7,
            "context_length": 4096,
            "eos_token_id": [5],
            "decoder": {
                "filename": "old.onnx",
                "session_options": {"log_id": "mine", "provider_options": []},
                "inputs": {"input_ids": "tokens", "past_key_names": "past_%d"},
                "sliding_window": {"window_size": 128},
            },
        },
        "search": {"top_k": 3, "past_present_share_buffer": True, "max_length": 99},
        "mine": 1,
    }
    write(tmp_path, genai_config=own, generation_config={"eos_token_id": 2, "top_k": 50})
    content = made(tmp_path)
    model = content["model"]
    assert (model["type"], model["context_length"], model["eos_token_id"]) == ("phi3", 4096, [5])
    assert model["vocab_size"] == 300
    assert model["decoder"]["filename"] == "model.onnx"
    assert model["decoder"]["session_options"] == {"log_id": "mine", "provider_options": []}
    assert model["decoder"]["sliding_window"] == {"window_size": 128}
    assert model["decoder"]["inputs"]["input_ids"] == "input_ids"
    assert content["search"]["top_k"] == 3
    assert content["search"]["max_length"] == 99
    assert content["search"]["past_present_share_buffer"] is False, "the graph concatenates"
    assert content["mine"] == 1


@pytest.mark.parametrize(("own", "shared"), [({}, True), ({"past_present_share_buffer": False}, False)])
def test_a_cache_that_grows_in_place_shares_its_buffer(tmp_path: Path, own: dict[str, Any], shared: bool) -> None:
    write(tmp_path, genai_config={"search": own})
    assert made(tmp_path, in_place=True)["search"]["past_present_share_buffer"] is shared


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"caches": ()}, "--add-kv-cache"),
        ({"caches": layers()[:3]}, "one key and one value per layer"),
        ({"caches": (cache("past.0.key", "present.0.key"), cache("past.0.value", "x", (None, 2, None, 8)))}, "wants"),
        ({"caches": (cache("past.1.key", "present.1.key"), cache("past.1.value", "present.1.value"))}, "numbered"),
        ({"extras": (Extra("cache_position", "steps", INT64, 1),)}, "cache_position"),
        ({"mask_rank": 4}, "has 4"),
        ({"batch": 1}, "fixed"),
        ({"mask_dtype": np.dtype(np.int32)}, "int32 and int64"),
        ({"vocab": None}, "vocabulary"),
    ],
)
def test_what_genai_cannot_run_gets_none_and_the_reason(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    assert reason in refused(tmp_path, signature(**changes))


def test_a_model_of_several_graphs_keeps_its_own(tmp_path: Path) -> None:
    write(tmp_path, genai_config={"model": {"type": "phi3v", "vision": {"filename": "vision.onnx"}}})
    assert "vision" in refused(tmp_path, signature())


@pytest.mark.parametrize("content", ["[]", "{", '{"model": 3}'])
def test_an_unreadable_side_file_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "genai_config.json").write_text(content)
    assert "not written" in refused(tmp_path, signature())
