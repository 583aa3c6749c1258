"""Inputs that the torch exporters trace a model with."""

from __future__ import annotations

from typing import Any

from zoo.families import VOCAB, Family

__all__ = ["sample"]

# No two sizes are equal, and none is 1: tracing would take them for the same or for constants.
_BATCH, _LENGTH = 2, 7


def sample(family: Family) -> tuple[dict[str, Any], dict[str, dict[int, str]], str]:
    """Arguments of forward by name, the names of their free axes, and the name of the first output."""
    import torch

    ids = torch.arange(_BATCH * _LENGTH).reshape(_BATCH, _LENGTH) * 11 % (VOCAB - 3) + 3
    axes = {0: "batch", 1: "sequence"}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    output = "logits" if family.kind == "decoder" else "last_hidden_state"
    return inputs, dict.fromkeys(inputs, axes), output
