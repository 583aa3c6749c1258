"""The encoders and encoder-decoders of the zoo."""

from __future__ import annotations

from typing import Any

from zoo.architecture import BASE, CONTEXT, HEADS, HIDDEN, LAYERS, VOCAB, Family

__all__ = ["ENCODERS", "ENCODER_DECODERS"]

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
ENCODERS: tuple[Family, ...] = (
    Family(
        "bert",
        "BertModel",
        {**BASE, "type_vocab_size": 2},
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
        {**BASE, "type_vocab_size": 1, "pad_token_id": 1},
        kind="encoder",
        task="feature-extraction",
        note="positions counted from the tokens that are not padding",
    ),
    Family(
        "vit",
        "ViTModel",
        {**BASE, "image_size": 32, "patch_size": 8},
        kind="encoder",
        task="feature-extraction",
        note="convolution in front, pre-norm, no mask",
    ),
)


ENCODER_DECODERS: tuple[Family, ...] = (
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
        refused={"script": "aten::diff"},
    ),
)
