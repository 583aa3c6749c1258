"""The ONNX graph computes what the safetensors weights say: an independent Llama forward pass in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# The reference is float64. Each logit is a chain of about 2 * layers sums of up to 768 float32 products; rounding
# errors of 2**-24 relative to values of about 10 add up like a random walk: 10 * 2**-24 * sqrt(10 * 768) = 5e-5.
MAX_DELTA = 2e-4  # four deviations of that


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def forward(ids: Array, config: dict[str, Any], weights: dict[str, Array]) -> Array:
    """Logits (tokens, vocab) of one unpadded sequence, head by head and without a cache."""
    w = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
    dim, eps, tokens = config["head_dim"], config["rms_norm_eps"], len(ids)
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    frequency = config["rope_theta"] ** (-np.arange(dim // 2) * 2.0 / dim)
    turn = np.exp(1j * np.arange(tokens)[:, None] * frequency)  # RoPE as complex rotation of (x[i], x[i + dim/2])
    future = np.triu(np.full((tokens, tokens), -np.inf), 1)

    def rotate(x: Array) -> Array:
        z = (x[:, : dim // 2] + 1j * x[:, dim // 2 :]) * turn
        return np.concatenate((z.real, z.imag), axis=1)

    x = w["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = rms_norm(x, w[layer + "input_layernorm.weight"], eps)
        q, k, v = (h @ w[f"{layer}self_attn.{n}_proj.weight"].T for n in "qkv")
        heads = []
        for head in range(config["num_attention_heads"]):
            own, shared = slice(head * dim, (head + 1) * dim), slice(head // group * dim, (head // group + 1) * dim)
            scores = rotate(q[:, own]) @ rotate(k[:, shared]).T / np.sqrt(dim)
            heads.append(softmax(scores + future) @ v[:, shared])
        x = x + np.concatenate(heads, axis=1) @ w[layer + "self_attn.o_proj.weight"].T
        h = rms_norm(x, w[layer + "post_attention_layernorm.weight"], eps)
        gate, up = (h @ w[f"{layer}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[layer + "mlp.down_proj.weight"].T
    return rms_norm(x, w["model.norm.weight"], eps) @ w["model.embed_tokens.weight"].T


def test_logits_equal_the_numpy_forward_pass(
    config: dict[str, Any], weights: dict[str, Array], step: Callable[..., tuple[Array, dict[str, Array]]]
) -> None:
    tokens = 96
    ids = np.random.default_rng(5).integers(0, config["vocab_size"], (2, tokens))
    positions = np.tile(np.arange(tokens), (2, 1))
    logits, _ = step(ids, np.ones_like(ids), positions)
    for row in range(2):
        np.testing.assert_allclose(logits[row], forward(ids[row], config, weights), rtol=0, atol=MAX_DELTA)
