"""Decoders with something that none of the main ones has, from one exporter of each kind."""

from __future__ import annotations

from zoo.architecture import CONTEXT, GQA, HEADS, HIDDEN, LAYERS, VOCAB, WINDOW, Family

__all__ = ["MORE_DECODERS"]

_ROTARIES = 2 * LAYERS  # queries and keys
_BY = ("optimum", "dynamo")
_INTERLEAVED = {"optimum": "interleaved RoPE over whole heads, tables repeated by TorchScript's spelling"}

MORE_DECODERS: tuple[Family, ...] = (
    Family(
        "cohere",
        "CohereForCausalLM",
        {**GQA, "logit_scale": 0.5, "use_qk_norm": False},
        note="interleaved RoPE over whole heads, LayerNorm without bias, attention and MLP in parallel, scaled logits",
        norms=LAYERS + 1,
        rotaries=_ROTARIES,
        gaps=_INTERLEAVED,
        exported_by=_BY,
    ),
    Family(
        "glm",
        "GlmForCausalLM",
        {**GQA, "head_dim": 16},
        note="interleaved RoPE over half of each head, packed gate/up, QKV biases",
        rotaries=_ROTARIES,
        gaps=_INTERLEAVED,
        exported_by=_BY,
    ),
    Family(
        "nemotron",
        "NemotronForCausalLM",
        {**GQA, "partial_rotary_factor": 0.5},
        note="LayerNorm with 1 + weight, squared ReLU, partial RoPE",
        rotaries=_ROTARIES,
        exported_by=_BY,
    ),
    Family(
        "olmo",
        "OlmoForCausalLM",
        {**GQA, "clip_qkv": 1.5},
        note="LayerNorm without weight and bias, clipped Q, K and V",
        rotaries=_ROTARIES,
        exported_by=_BY,
    ),
    Family(
        "mpt",
        "MptForCausalLM",
        {
            "vocab_size": VOCAB,
            "d_model": HIDDEN,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "max_seq_len": CONTEXT,
            "expansion_ratio": 2,
        },
        note="ALiBi from the length alone, LayerNorm without bias",
        exported_by=_BY,
    ),
    Family(
        "gpt_neo",
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
            "max_position_embeddings": CONTEXT,
            "intermediate_size": 96,
        },
        note=f"unscaled scores, a stored mask with a window of {WINDOW} in layer 1, learned positions",
        exported_by=_BY,
    ),
)
