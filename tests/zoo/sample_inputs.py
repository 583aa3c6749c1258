"""Inputs that the torch exporters trace a model with."""

from __future__ import annotations

from typing import Any

from zoo.families import VOCAB, Family

__all__ = ["sample"]

# No two sizes are equal, and none is 1: tracing would take them for the same or for constants.
_BATCH, _LENGTH, _DECODED = 2, 7, 5
_AXES = {0: "batch", 1: "sequence"}


def sample(family: Family) -> tuple[dict[str, Any], dict[str, dict[int, str]], str]:
    """Arguments of forward by name, the names of their free axes, and the name of the first output."""
    import torch

    def tokens(length: int) -> Any:
        return torch.arange(_BATCH * length).reshape(_BATCH, length) * 11 % (VOCAB - 3) + 3

    if family.name == "vit":
        size = family.config["image_size"]
        pixels = torch.linspace(-1, 1, _BATCH * 3 * size * size).reshape(_BATCH, 3, size, size)
        return {"pixel_values": pixels}, {"pixel_values": {0: "batch"}}, "last_hidden_state"
    decoded = {"decoder_input_ids": tokens(_DECODED)}
    decoded_axes = {"decoder_input_ids": {0: "batch", 1: "decoder_sequence"}}
    if family.name == "whisper":
        frames = 2 * family.config["max_source_positions"]
        features = torch.linspace(-1, 1, _BATCH * 16 * frames).reshape(_BATCH, 16, frames)
        return {"input_features": features, **decoded}, {"input_features": {0: "batch"}, **decoded_axes}, "logits"
    inputs = {"input_ids": tokens(_LENGTH), "attention_mask": torch.ones(_BATCH, _LENGTH, dtype=torch.int64)}
    axes = dict.fromkeys(inputs, _AXES)
    if family.kind == "encoder-decoder":
        return {**inputs, **decoded}, {**axes, **decoded_axes}, "logits"
    return inputs, axes, "logits" if family.kind == "decoder" else "last_hidden_state"
