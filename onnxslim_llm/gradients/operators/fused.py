"""The compiler's own concepts, each as one torch expression: the same meaning as their bodies, in fewer steps.

Concepts that are not here (products with block-quantized weights) run as their bodies say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxslim_llm.concepts.attention import AttentionForm
from onnxslim_llm.gradients.backend import torch
from onnxslim_llm.gradients.rule import Call, Rule

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RULES", "attention_rule"]

F = torch.nn.functional

#: What a hidden score becomes where rows that see nothing are not zeros: see `concepts.attention`.
_LOWEST = torch.finfo(torch.float32).min


def _rms_norm(call: Call) -> Tensor:
    x, scale = call.input(0), call.input(1)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + call.attributes["epsilon"]) * scale


def _swish(call: Call) -> Tensor:
    x, alpha = call.input(0), call.attributes["alpha"]
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


def _rotate_half(call: Call) -> Tensor:
    x, passed, c, s = _rotary_parts(call)
    first, second = x.chunk(2, -1)
    return torch.cat([first * c - second * s, first * s + second * c, *passed], -1).flatten(2)


def _rotate_interleaved(call: Call) -> Tensor:
    x, passed, c, s = _rotary_parts(call)
    first, second = x[..., ::2], x[..., 1::2]
    turned = torch.stack([first * c - second * s, first * s + second * c], -1).flatten(-2)
    return torch.cat([turned, *passed], -1).flatten(2)


def _rotary_parts(call: Call) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Return what is turned [B, S, H, R], what passes, and the tables [B, S, 1, R/2]."""
    x, size = call.input(0), call.attributes["rotary_dim"]
    heads = x.unflatten(-1, (call.attributes["num_heads"], -1))
    passed = [heads[..., size:]] if size < heads.shape[-1] else []
    return heads[..., :size], passed, call.input(1).unsqueeze(2), call.input(2).unsqueeze(2)


def attention_rule(form: AttentionForm) -> Rule:
    """Return the rule of one form of attention."""

    def rule(call: Call) -> list[Tensor]:
        given = dict(zip(form.inputs, call.inputs, strict=True))
        hq, hk = call.attributes["q_num_heads"], call.attributes["kv_num_heads"]
        q, k, v = (_by_head(given[name], n, form) for name, n in (("Q", hq), ("K", hk), ("V", hk)))
        if form.past:
            k = torch.cat([given["past_key"], k], 2)
            v = torch.cat([given["past_value"], v], 2)
        plain = not (form.bias or form.window or form.softcap)
        if plain and (not form.causal or q.shape[2] == k.shape[2]):
            mixed = F.scaled_dot_product_attention(
                q, *_repeated(q, k, v), is_causal=form.causal, scale=call.attributes["scale"]
            )
        else:
            mixed = _mix(call, form, q, *_repeated(q, k, v), given.get("bias"))
        y = mixed if form.heads_major else mixed.transpose(1, 2).flatten(2)
        return [y, k, v] if form.present else [y]

    return rule


def _by_head(x: Tensor | None, heads: int, form: AttentionForm) -> Tensor:
    assert x is not None
    return x if form.heads_major else x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values with one head for each head of the queries."""
    group = q.shape[1] // k.shape[1]
    return (k, v) if group == 1 else (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))


def _mix(call: Call, form: AttentionForm, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Return the weighted values, step by step as the concept defines them."""
    scores = (q * call.attributes["scale"]) @ k.transpose(-1, -2)
    if form.softcap:
        cap = call.attributes["softcap"]
        scores = torch.tanh(scores / cap) * cap
    if bias is not None:
        scores = scores + bias
    if form.causal or form.window:
        total = k.shape[2]
        row = torch.arange(total - q.shape[2], total)[:, None]
        column = torch.arange(total)
        hidden = column > row if form.causal else torch.zeros_like(column > row)
        if form.window:
            hidden = hidden | (column <= row - call.attributes["window"])
        scores = scores.masked_fill(hidden, -torch.inf if form.zero_rows else _LOWEST)
    if not form.zero_rows:
        return torch.softmax(scores, -1) @ v
    # A row without any key: not through a softmax of NaN, whose gradient would be NaN, too.
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0), -1).masked_fill(empty, 0) @ v


RULES: dict[str, Rule] = {
    "Gelu": lambda call: F.gelu(call.input(0)),
    "GeluTanh": lambda call: F.gelu(call.input(0), approximate="tanh"),
    "RMSNorm": _rms_norm,
    "RotaryHalf": _rotate_half,
    "RotaryInterleaved": _rotate_interleaved,
    "Swish": _swish,
}
