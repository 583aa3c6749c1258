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


_ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
_GPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA: dict[str, Any] = {**_GQA, "head_dim": 16}
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

_DECODERS: tuple[Family, ...] = (
    Family("llama", "LlamaForCausalLM", _GQA, note="RMSNorm, half-rotated RoPE, GQA 4:2, SwiGLU"),
    Family(
        "llama3",
        "LlamaForCausalLM",
        {**_GQA, "rope_scaling": _LLAMA3_ROPE, "tie_word_embeddings": True},
        note="llama with llama3-scaled RoPE, tied lm_head",
    ),
    Family(
        "llama-linear",
        "LlamaForCausalLM",
        {**_BASE, "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "attention_bias": True, "mlp_bias": True},
        note="llama with linear RoPE scaling, MHA without repeated heads, biases on all projections",
    ),
    Family(
        "llama-yarn",
        "LlamaForCausalLM",
        {**_GQA, "num_key_value_heads": 1, "rope_scaling": _YARN_ROPE},
        note="llama with YaRN (cos and sin are scaled too), MQA",
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        {**_GQA, "sliding_window": WINDOW},
        note=f"llama with a sliding window of {WINDOW} in every layer",
    ),
    Family("qwen2", "Qwen2ForCausalLM", _GQA, note="llama with biases on Q, K and V"),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        {**_GQA, "head_dim": 24},
        note="RMSNorm per head on Q and K; heads * head_dim > hidden",
    ),
    Family(
        "gemma",
        "GemmaForCausalLM",
        {**_GEMMA, "num_key_value_heads": 1},
        note="embedding scaled, norms with 1 + weight, GeGLU tanh, MQA, tied lm_head",
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
    ),
    Family(
        "phi",
        "PhiForCausalLM",
        {**_BASE, "partial_rotary_factor": 0.5},
        note="one LayerNorm feeds attention and MLP in parallel, partial RoPE, biases everywhere, also on lm_head",
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        {**_GQA, "sliding_window": None, "original_max_position_embeddings": CONTEXT},
        note="packed QKV and packed gate/up in the source",
    ),
    Family(
        "phi3-longrope",
        "Phi3ForCausalLM",
        {
            **_GQA,
            "sliding_window": WINDOW,
            "rope_scaling": _LONG_ROPE,
            "original_max_position_embeddings": 128,
        },
        note=f"phi3 with longrope (two sets of factors, scaled cos and sin) and a window of {WINDOW}",
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        _GPT,
        note="learned positions, LayerNorm with bias, packed QKV as Gemm and Split, tanh Gelu, tied lm_head",
    ),
    Family(
        "gptj",
        "GPTJForCausalLM",
        {**_GPT, "rotary_dim": 8},
        note="interleaved partial RoPE from a table, parallel residual",
    ),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        {**_BASE, "rotary_pct": 0.25},
        note="QKV packed per head, partial RoPE, parallel residual with two LayerNorms, erf Gelu",
    ),
    Family(
        "opt",
        "OPTForCausalLM",
        {**_BASE, "ffn_dim": 96, "word_embed_proj_dim": HIDDEN},
        note="learned positions counted from the mask with an offset of 2, ReLU, scaled queries",
    ),
    Family(
        "bloom",
        "BloomForCausalLM",
        {"vocab_size": VOCAB, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "pad_token_id": 0},
        note="ALiBi from the mask, LayerNorm on the embedding, QKV packed per head, its own tanh Gelu",
    ),
    Family("olmo2", "Olmo2ForCausalLM", _GQA, note="norms after attention and MLP, Q/K RMSNorm over the whole width"),
    Family(
        "granite",
        "GraniteForCausalLM",
        {
            **_GQA,
            "embedding_multiplier": 12.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.2,
        },
        note="llama with multipliers on embedding, residuals, scores and logits",
    ),
    Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        {**_GQA, "no_rope_layers": [1, 0], "layer_types": ["full_attention"] * LAYERS, "use_sliding_window": False},
        note="no RoPE in layer 1",
    ),
    Family(
        "stablelm",
        "StableLmForCausalLM",
        {**_GQA, "partial_rotary_factor": 0.25, "use_qkv_bias": True},
        note="LayerNorm with SwiGLU, partial RoPE, GQA, QKV biases",
    ),
    Family(
        "falcon",
        "FalconForCausalLM",
        {**_BASE, "num_hidden_layers": LAYERS, "multi_query": True, "parallel_attn": True, "bias": False},
        note="MQA packed QKV, one LayerNorm for attention and MLP in parallel, erf Gelu",
    ),
    Family(
        "falcon-gqa",
        "FalconForCausalLM",
        {**_BASE, "new_decoder_architecture": True, "num_kv_heads": KV_HEADS, "bias": True},
        note="GQA packed per group, two LayerNorms in parallel, biases",
    ),
)

_ENCODERS: tuple[Family, ...] = (
    Family(
        "bert",
        "BertModel",
        {**_BASE, "type_vocab_size": 2},
        kind="encoder",
        task="feature-extraction",
        note="post-norm, erf Gelu, token types",
    ),
    Family(
        "distilbert",
        "DistilBertModel",
        {"vocab_size": VOCAB, "dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 96},
        kind="encoder",
        task="feature-extraction",
        note="bert without token types",
    ),
    Family(
        "roberta",
        "RobertaModel",
        {**_BASE, "type_vocab_size": 1, "pad_token_id": 1},
        kind="encoder",
        task="feature-extraction",
        note="positions counted from the tokens that are not padding",
    ),
    Family(
        "vit",
        "ViTModel",
        {**_BASE, "image_size": 32, "patch_size": 8},
        kind="encoder",
        task="feature-extraction",
        note="convolution in front, pre-norm, no mask",
    ),
)

_ENCODER_DECODERS: tuple[Family, ...] = (
    Family(
        "t5",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCAB,
            "d_model": HIDDEN,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "decoder_start_token_id": 0,
        },
        kind="encoder-decoder",
        task="text2text-generation-with-past",
        note="relative position bias added to unscaled scores, RMSNorm, cross-attention, ReLU",
    ),
    Family(
        "bart",
        "BartForConditionalGeneration",
        {**_ENCODER_DECODER, "max_position_embeddings": CONTEXT, "forced_eos_token_id": None},
        kind="encoder-decoder",
        task="text2text-generation-with-past",
        note="post-norm, biases, learned positions, cross-attention",
    ),
    Family(
        "whisper",
        "WhisperForConditionalGeneration",
        {
            **_ENCODER_DECODER,
            "num_mel_bins": 16,
            "max_source_positions": 1500,  # what Optimum feeds, whatever the configuration says
            "max_target_positions": CONTEXT,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        kind="encoder-decoder",
        task="automatic-speech-recognition-with-past",
        note="convolutions in front, K without bias, pre-norm, cross-attention",
    ),
)

FAMILIES: tuple[Family, ...] = (*_DECODERS, *_ENCODERS, *_ENCODER_DECODERS)

_BY_NAME = {entry.name: entry for entry in FAMILIES}


def family(name: str) -> Family:
    """The family of that name."""
    return _BY_NAME[name]
