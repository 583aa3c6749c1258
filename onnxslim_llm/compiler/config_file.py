"""config.json of an artifact that has fewer heads, blocks or channels than its source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from onnxslim_llm.rewrite.pipeline import PassRecord

__all__ = ["changed_config", "config_changes"]

#: What passes say -> how configurations of different architectures spell it.
_SPELLINGS = {
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "head_dim": ("head_dim",),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
}
#: Lists with an entry for each layer.
_BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers")
_LAYERS_GONE = "layers_gone"


def config_changes(records: Iterable[PassRecord]) -> list[dict[str, Any]]:
    """Return what passes have changed of what a configuration says, in order (`detail["config"]` of each).

    An empty entry stands for something that no configuration can say.
    """
    found = (record.detail.get("config") for record in records if not record.rolled_back)
    return [dict(entry) for entry in found if entry is not None]


def changed_config(config: Mapping[str, Any], changes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a configuration that says what the artifact is.

    Args:
        config: That of the source.
        changes: What `config_changes` returns.
    """
    result = dict(config)
    for change in changes:
        for name, value in change.items():
            if name == _LAYERS_GONE:
                _drop_layers(result, value)
                continue
            spelling = next((s for s in _SPELLINGS.get(name, ()) if s in result), None)
            if spelling is not None:
                result[spelling] = value
            elif name == "head_dim" and result:
                result[name] = value  # it followed from the number of heads before
    return result


def _drop_layers(config: dict[str, Any], gone: Iterable[int]) -> None:
    lost = set(gone)
    for name in _BY_LAYER:
        if isinstance(config.get(name), list):
            config[name] = [entry for i, entry in enumerate(config[name]) if i not in lost]
