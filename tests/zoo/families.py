"""The architectures: tiny configurations as data, and what a compiled model of each must look like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["FAMILIES", "HEADS", "HIDDEN", "LAYERS", "VOCAB", "WINDOW", "Family", "family"]

Kind = Literal["decoder", "encoder", "encoder-decoder"]

LAYERS, HIDDEN, HEADS, KV_HEADS, VOCAB, CONTEXT = 2, 64, 4, 2, 300, 256
WINDOW = 8  # shorter than every tested text, so that a rule that forgets the window shows

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 96,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA: dict[str, Any] = {**_BASE, "num_key_value_heads": KV_HEADS}


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: in test ids, file names and tables.
        model: class in `transformers`, whose configuration class is known to it.
        config: its arguments; everything else is the class's default.
        kind: what goes in and out.
        task: Optimum's name of the task, with a cache where there is one.
        note: what is special in the graph.
    """

    name: str
    model: str
    config: Mapping[str, Any] = field(default_factory=dict)
    kind: Kind = "decoder"
    task: str = "text-generation-with-past"
    note: str = ""


FAMILIES: tuple[Family, ...] = (
    Family("llama", "LlamaForCausalLM", _GQA, note="RMSNorm, half-rotated RoPE, GQA 4:2, SwiGLU"),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        {**_GQA, "head_dim": 16, "layer_types": ["full_attention"] * LAYERS},
        note="llama with an RMSNorm per head on queries and keys",
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCAB,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": CONTEXT,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        note="learned positions, LayerNorm with bias, packed QKV as Gemm and Split, tanh Gelu, tied lm_head",
    ),
    Family(
        "bert",
        "BertModel",
        {**_BASE, "type_vocab_size": 2},
        kind="encoder",
        task="feature-extraction",
        note="encoder, post-norm, erf Gelu, token types",
    ),
)

_BY_NAME = {entry.name: entry for entry in FAMILIES}


def family(name: str) -> Family:
    """The family of that name."""
    return _BY_NAME[name]
