"""Sparse artifacts from end to end: made, compiled again, and given to other tools."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnxslim_llm as osl
from onnxslim_llm.artifact.manifest import read_manifest
from onnxslim_llm.compiler.sparse_export import export_sparse
from onnxslim_llm.custom_ops import ops, sparse

pytestmark = pytest.mark.skipif(ops.library_path() is None, reason="the operators were not built")

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
extends = "safe"
description = "the recipe `sparse` without what needs data"
when = "here"
gates = "int4"

[[passes]]
name = "prune_weights"
sparsity = 0.5
method = "magnitude"

[[passes]]
name = "quantize_weights"
bits = 4

[[passes]]
name = "store_sparse"
min_saving = 0.1
"""
OVERHEAD = 0.45
"""Of the dense bytes: at 4 bits 1 for the bitmap where codes take 4 and scales, which stay, 0.5: 1.5 / 4.5; and 0.11
for uneven nibbles, and for the tables and padding of matrices as small as these. Weights of 8 bits have less of all."""


def packed_weights(model: Path) -> dict[str, np.ndarray[Any, Any]]:
    proto = onnx.load(model)
    used = {node.input[1] for node in proto.graph.node if node.op_type == "MatMulPacked"}
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer if t.name in used}


def test_bytes_follow_the_density_and_stay_what_they_are(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "reference_decoder.py"
    subprocess.run([sys.executable, script, tmp_path / "tiny.onnx"], check=True, capture_output=True)
    (tmp_path / "sparse.toml").write_text(RECIPE)
    recipe, build = tmp_path / "sparse.toml", tmp_path / "build"
    osl.compile(tmp_path / "tiny.onnx", build, target="ort-cpu-ops", recipe=recipe, verify="off")

    (entry,) = [record for record in read_manifest(build).passes if record.name == "store_sparse"]
    assert entry.detail["break_even"]["bitmap, 4 bits"] == 0.25
    weights = packed_weights(build / "model.onnx")
    tensors = entry.detail["tensors"]
    assert len(tensors) >= 4
    for tensor in tensors:
        assert tensor["sparse_bytes"] <= tensor["dense_bytes"] * (1 - tensor["zeros"] + OVERHEAD)
        assert sparse.is_sparse(weights[tensor["name"]])
        assert weights[tensor["name"]].size == tensor["sparse_bytes"]

    again = tmp_path / "again"
    osl.compile(build, again, target="ort-cpu-ops", recipe="safe")
    found = packed_weights(again / "model.onnx")
    for tensor in tensors:
        np.testing.assert_array_equal(found[tensor["name"]], weights[tensor["name"]])

    index = export_sparse(build / "model.onnx", tmp_path / "matrices", "csr")
    assert {tensor["name"] for tensor in tensors if tensor["zeros"] > 0.5} <= {matrix["name"] for matrix in index}
