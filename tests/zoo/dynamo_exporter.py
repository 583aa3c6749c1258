"""Exports by torch.onnx.export(dynamo=True), without a cache."""

from __future__ import annotations

from pathlib import Path

from zoo.families import Family
from zoo.sample_inputs import sample
from zoo.weights import build

__all__ = ["export"]


def export(family: Family, folder: Path) -> None:
    """Write `folder`/model.onnx, batch and sequence length free."""
    import torch

    model = build(family)
    model.config.use_cache = False
    inputs, axes, output = sample(family)
    dims = {name: torch.export.Dim(name) for names in axes.values() for name in names.values()}
    torch.onnx.export(
        model,
        (),
        str(folder / "model.onnx"),
        kwargs=inputs,
        dynamo=True,
        dynamic_shapes={name: {axis: dims[dim] for axis, dim in axes[name].items()} for name in inputs},
        input_names=list(inputs),
        output_names=[output],
        external_data=False,
        verbose=False,
    )
