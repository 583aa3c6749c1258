"""Exports by optimum-onnx: TorchScript tracing, with a KV cache where the task has one."""

from __future__ import annotations

from pathlib import Path

from zoo.families import Family
from zoo.weights import build

__all__ = ["export"]


def export(family: Family, folder: Path) -> None:
    """Write Optimum's files of `family` (model.onnx, config.json, ...) into `folder`."""
    from optimum.exporters.onnx import onnx_export_from_model

    onnx_export_from_model(build(family), folder, task=family.task, do_validation=False)
