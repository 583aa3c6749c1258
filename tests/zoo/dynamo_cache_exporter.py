"""Exports by torch.onnx.export(dynamo=True) with a KV cache; positions follow from its length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.families import LAYERS, Family
from zoo.sample_inputs import sample
from zoo.weights import build

__all__ = ["export"]

_PAST = 5


def export(family: Family, folder: Path) -> None:
    """Write `folder`/model.onnx with inputs past_key_values.N.key/value and outputs present.N.key/value.

    Raises:
        NotImplementedError: the family has no such cache.
    """
    import torch

    if family.kind != "decoder":
        raise NotImplementedError("only decoders are exported with a cache by dynamo")
    model = build(family)
    inputs, _, output = sample(family)
    ids = inputs["input_ids"]
    with torch.no_grad():
        shapes = [tuple(layer.shape) for layer in _tensors(model(ids, use_cache=True).past_key_values)]
    past = [torch.randn(batch, heads, _PAST, size) for batch, heads, _, size in shapes]
    mask = torch.ones(ids.shape[0], _PAST + ids.shape[1], dtype=torch.int64)
    batch, sequence, before = (torch.export.Dim(name) for name in ("batch", "sequence", "past_sequence"))
    names = [f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
    torch.onnx.export(
        _with_flat_cache(model),
        (ids, mask, past),
        str(folder / "model.onnx"),
        dynamo=True,
        dynamic_shapes=(
            {0: batch, 1: sequence},
            {0: batch, 1: torch.export.Dim.DYNAMIC},
            [{0: batch, 2: before} for _ in past],
        ),
        input_names=["input_ids", "attention_mask", *(f"past_key_values.{name}" for name in names)],
        output_names=[output, *(f"present.{name}" for name in names)],
        external_data=False,
        verbose=False,
    )


def _with_flat_cache(model: Any) -> Any:
    """`model` with the cache as a list of tensors: key and value of layer 0, of layer 1, ..."""
    import torch
    from transformers.cache_utils import DynamicCache

    class FlatCache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, past: list[Any]) -> Any:
            cache = DynamicCache()
            for layer in range(len(past) // 2):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            result = self.model(input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
            return result.logits, *_tensors(result.past_key_values)

    return FlatCache()


def _tensors(cache: Any) -> list[Any]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
