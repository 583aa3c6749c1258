"""The decoders of the zoo."""

from __future__ import annotations

from typing import Any

from zoo.architecture import BASE, CONTEXT, GQA, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCAB, WINDOW, Family

__all__ = ["DECODERS"]

_GPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA: dict[str, Any] = {**GQA, "head_dim": 16}
# The wavelengths of a head of 16 lie on both sides of both limits: kept, interpolated and divided frequencies occur.
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LONG_ROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.8, 2.0],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 16.0],
}

_ROTARIES = 2 * LAYERS  # queries and keys
_UNKNOWN_TO_GENAI = {"genai": "not currently supported"}

DECODERS: tuple[Family, ...] = (
    Family(
        "llama",
        "LlamaForCausalLM",
        GQA,
        note="RMSNorm, half-rotated RoPE, GQA 4:2, SwiGLU",
        rotaries=_ROTARIES,
        layer_nodes=13,
    ),
    Family(
        "llama3",
        "LlamaForCausalLM",
        {**GQA, "rope_scaling": _LLAMA3_ROPE, "tie_word_embeddings": True},
        note="llama with llama3-scaled RoPE, tied lm_head",
        rotaries=_ROTARIES,
    ),
    Family(
        "llama-linear",
        "LlamaForCausalLM",
        {**BASE, "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "attention_bias": True, "mlp_bias": True},
        note="llama with linear RoPE scaling, MHA without repeated heads, biases on all projections",
        rotaries=_ROTARIES,
    ),
    Family(
        "llama-yarn",
        "LlamaForCausalLM",
        {**GQA, "num_key_value_heads": 1, "rope_scaling": _YARN_ROPE},
        note="llama with YaRN (cos and sin are scaled too), MQA",
        rotaries=_ROTARIES,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        {**GQA, "sliding_window": WINDOW},
        note=f"llama with a sliding window of {WINDOW} in every layer",
        rotaries=_ROTARIES,
        layer_nodes=13,
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        GQA,
        note="llama with biases on Q, K and V",
        rotaries=_ROTARIES,
        layer_nodes=14,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        {**GQA, "head_dim": 32},
        note="RMSNorm per head on Q and K; heads * head_dim > hidden",
        norms=4 * LAYERS + 1,
        rotaries=_ROTARIES,
        layer_nodes=19,
    ),
    Family(
        "gemma",
        "GemmaForCausalLM",
        {**_GEMMA, "num_key_value_heads": 1},
        note="embedding scaled, norms with 1 + weight, GeGLU tanh, MQA, tied lm_head",
        rotaries=_ROTARIES,
        layer_nodes=13,
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        {
            **_GEMMA,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        note=f"gemma with softcaps on scores and logits, window {WINDOW} in layer 0, four norms a layer, odd scale",
        norms=4 * LAYERS + 1,
        rotaries=_ROTARIES,
    ),
    Family(
        "gemma3",
        "Gemma3ForCausalLM",
        {
            **_GEMMA,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        note=f"Q/K norms with 1 + weight, window {WINDOW} and its own RoPE base in layer 0, scaled RoPE in layer 1",
        norms=6 * LAYERS + 1,
        rotaries=_ROTARIES,
    ),
    Family(
        "phi",
        "PhiForCausalLM",
        {**BASE, "num_attention_heads": 2, "partial_rotary_factor": 0.5},
        note="one LayerNorm feeds attention and MLP in parallel, partial RoPE, biases everywhere, also on lm_head",
        norms=LAYERS + 1,
        rotaries=_ROTARIES,
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        {**GQA, "sliding_window": None, "original_max_position_embeddings": CONTEXT},
        note="packed QKV and packed gate/up in the source",
        rotaries=_ROTARIES,
        layer_nodes=16,
    ),
    Family(
        "phi3-longrope",
        "Phi3ForCausalLM",
        {
            **GQA,
            "sliding_window": WINDOW,
            "rope_scaling": _LONG_ROPE,
            "original_max_position_embeddings": 128,
        },
        note=f"phi3 with longrope (two sets of factors, scaled cos and sin) and a window of {WINDOW}",
        rotaries=_ROTARIES,
        refused={"dynamo": "data-dependent", "dynamo-cache": "data-dependent"},
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        _GPT,
        note="learned positions, LayerNorm with bias, packed QKV as Gemm and Split, tanh Gelu, tied lm_head",
        refused=_UNKNOWN_TO_GENAI,
    ),
    Family(
        "gptj",
        "GPTJForCausalLM",
        {**_GPT, "rotary_dim": 8},
        note="interleaved partial RoPE from a table, parallel residual",
        norms=LAYERS + 1,
        rotaries=_ROTARIES,
        refused=_UNKNOWN_TO_GENAI,
    ),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        {**BASE, "rotary_pct": 0.25},
        note="QKV packed per head, partial RoPE, parallel residual with two LayerNorms, erf Gelu",
        rotaries=_ROTARIES,
        refused=_UNKNOWN_TO_GENAI,
    ),
    Family(
        "opt",
        "OPTForCausalLM",
        {**BASE, "ffn_dim": 96, "word_embed_proj_dim": HIDDEN},
        note="learned positions counted from the mask with an offset of 2, ReLU, scaled queries",
        refused=_UNKNOWN_TO_GENAI,
    ),
    Family(
        "bloom",
        "BloomForCausalLM",
        {"vocab_size": VOCAB, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "pad_token_id": 0},
        note="ALiBi from the mask, LayerNorm on the embedding, QKV packed per head, its own tanh Gelu",
        norms=2 * LAYERS + 2,
        refused=_UNKNOWN_TO_GENAI,
    ),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        GQA,
        note="norms after attention and MLP, Q/K RMSNorm over the whole width",
        norms=4 * LAYERS + 1,
        rotaries=_ROTARIES,
        refused=_UNKNOWN_TO_GENAI,
        layer_nodes=17,
    ),
    Family(
        "granite",
        "GraniteForCausalLM",
        {
            **GQA,
            "embedding_multiplier": 12.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.2,
        },
        note="llama with multipliers on embedding, residuals, scores and logits",
        rotaries=_ROTARIES,
        layer_nodes=15,
    ),
    Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        {**GQA, "no_rope_layers": [1, 0], "layer_types": ["full_attention"] * LAYERS, "use_sliding_window": False},
        note="no RoPE in layer 1",
        rotaries=2,
        refused={"genai": "position_ids"},
        layer_nodes=13,
    ),
    Family(
        "stablelm",
        "StableLmForCausalLM",
        {**GQA, "partial_rotary_factor": 0.25, "use_qkv_bias": True},
        note="LayerNorm with SwiGLU, partial RoPE, GQA, QKV biases",
        rotaries=_ROTARIES,
        refused=_UNKNOWN_TO_GENAI,
    ),
    Family(
        "falcon",
        "FalconForCausalLM",
        {**BASE, "num_hidden_layers": LAYERS, "multi_query": True, "parallel_attn": True, "bias": False},
        note="MQA packed QKV, one LayerNorm for attention and MLP in parallel, erf Gelu",
        norms=LAYERS + 1,
        rotaries=_ROTARIES,
        refused=_UNKNOWN_TO_GENAI,
    ),
    Family(
        "falcon-gqa",
        "FalconForCausalLM",
        {**BASE, "new_decoder_architecture": True, "num_kv_heads": KV_HEADS, "bias": True},
        note="GQA packed per group, two LayerNorms in parallel, biases",
        rotaries=_ROTARIES,
        refused={
            **_UNKNOWN_TO_GENAI,
            "optimum": "Sizes of tensors must match",
            "optimum-eager": "Sizes of tensors must match",
        },
    ),
)
