"""config.json after structural passes, in the spellings of different architectures."""

from __future__ import annotations

from typing import Any

import pytest

from onnxslim_llm.compiler.config_file import changed_config, config_changes
from onnxslim_llm.rewrite.pipeline import PassRecord

HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32}
LAYERS = {"num_hidden_layers": 2, "layers_gone": [1]}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 256, "num_hidden_layers": 3},
            {**HEADS, "hidden_size": 256, "num_hidden_layers": 2},
        ),
        ({"n_head": 8, "n_layer": 3, "n_embd": 256}, {"n_head": 6, "n_layer": 2, "n_embd": 256, "head_dim": 32}),
        (
            {"num_attention_heads": 8, "num_hidden_layers": 3, "layer_types": ["a", "b", "c"]},
            {"num_attention_heads": 6, "num_hidden_layers": 2, "layer_types": ["a", "c"], "head_dim": 32},
        ),
        ({}, {}),
    ],
)
def test_what_changes_is_said_in_the_words_of_the_source(config: dict[str, Any], expected: dict[str, Any]) -> None:
    given = dict(config)
    assert changed_config(config, [HEADS, LAYERS]) == expected
    assert config == given


def test_only_what_was_not_undone_counts() -> None:
    records = [
        PassRecord("prune_heads", {}, detail={"config": HEADS}),
        PassRecord("remove_blocks", {}, detail={"config": LAYERS}, rolled_back="the model does not run with it"),
        PassRecord("cleanup", {}),
        PassRecord("prune_heads", {}, detail={"config": {}}),
    ]
    assert config_changes(records) == [HEADS, {}]
    assert changed_config({"n_head": 8}, [{}]) == {"n_head": 8}
