"""Exports by torch.onnx.export(dynamo=False), that is TorchScript, without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.families import Family
from zoo.sample_inputs import sample
from zoo.weights import build

__all__ = ["export"]


def export(family: Family, folder: Path) -> None:
    """Write `folder`/model.onnx, batch and sequence length free."""
    import torch

    inputs, axes, output = sample(family)
    model = build(family)
    model.config.use_cache = False
    if family.kind != "encoder" and model.config._attn_implementation == "sdpa":
        _mask_without_vmap(model)
    torch.onnx.export(
        _positional(model, list(inputs)),
        tuple(inputs.values()),
        str(folder / "model.onnx"),
        dynamo=False,
        input_names=list(inputs),
        output_names=[output],
        dynamic_axes={**axes, output: {0: "batch", 1: "sequence"}},
    )


def _mask_without_vmap(model: Any) -> None:
    """Let masks be made by plain operators: the default uses vmap, which cannot be traced."""
    from optimum.exporters.onnx.model_patcher import sdpa_mask_without_vmap
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = "sdpa_without_vmap"
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, sdpa_mask_without_vmap)
    ALL_ATTENTION_FUNCTIONS.register(name, ALL_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation = name


def _positional(model: Any, names: list[str]) -> Any:
    """`model` with positional inputs and its first output only."""
    import torch

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: Any) -> Any:
            return self.model(**dict(zip(names, args, strict=True)), return_dict=True)[0]

    return Positional()
