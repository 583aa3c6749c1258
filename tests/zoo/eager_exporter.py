"""Exports by optimum-onnx of models that spell attention out: MatMul, mask, Softmax, MatMul instead of torch's SDPA."""

from __future__ import annotations

from pathlib import Path

from zoo.families import Family
from zoo.weights import build

__all__ = ["export"]


def export(family: Family, folder: Path) -> None:
    """Write Optimum's files of `family` (model.onnx, config.json, ...) into `folder`."""
    from optimum.exporters.onnx import onnx_export_from_model

    model = build(family)
    model.set_attn_implementation("eager")
    onnx_export_from_model(model, folder, task=family.task, do_validation=False)
