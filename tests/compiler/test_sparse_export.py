"""Sparse matrices for scipy and others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxslim_llm.compiler.sparse_export import INDEX, SparseFormat, export_sparse
from onnxslim_llm.custom_ops import matmul_reference, ops, packed, sparse
from onnxslim_llm.custom_ops.packed import PackedScheme
from onnxslim_llm.custom_ops.packing import pack_bits
from onnxslim_llm.errors import ModelError, UsageError

Array = np.ndarray[Any, Any]
FORMATS: tuple[SparseFormat, ...] = ("csr", "csc")


def pruned(shape: tuple[int, int], zeros: float, dtype: str = "float32") -> Array:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(shape)
    values[rng.random(shape) < zeros] = 0
    return values.astype(dtype)


def sparse_codes() -> Array:
    rng = np.random.default_rng(1)
    codes = np.where(rng.random((48, 2, 32)) < 0.7, 8, rng.integers(0, 16, (48, 2, 32))).astype(np.uint8)
    scales = np.full((48, 2), 2**-6, np.float16)
    return sparse.make_sparse(packed.pack(PackedScheme(64, 48), pack_bits(codes, 4), scales, None))


def saved(folder: Path, **tensors: Array) -> Path:
    """A model with these initializers; "B" is the weight of a product of ours."""
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in tensors if name != "B"]
    outputs = [helper.make_empty_tensor_value_info(f"{name}_out") for name in tensors]
    if "B" in tensors:
        attributes = {"K": 64, "N": 48, "bits": 4, "block_size": 32}
        nodes.append(helper.make_node("MatMulPacked", ["x", "B"], ["B_out"], domain=ops.DOMAIN, **attributes))
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["m", 64])
    constants = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "g", [x], outputs, constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), folder / "model.onnx")
    return folder / "model.onnx"


def dense_of(file: Path) -> Array:
    """Read a file without scipy, as its documentation describes the fields."""
    with np.load(file) as found:
        result = np.zeros(found["shape"], found["data"].dtype)
        lines = result if found["format"].item() == b"csr" else result.T
        for line, (start, stop) in enumerate(zip(found["indptr"][:-1], found["indptr"][1:], strict=True)):
            lines[line, found["indices"][start:stop]] = found["data"][start:stop]
    return result


@pytest.mark.parametrize("layout", FORMATS)
def test_matrices_come_back(tmp_path: Path, layout: SparseFormat) -> None:
    tensors = {"W": pruned((40, 24), 0.6), "H": pruned((16, 24), 0.9, "float16"), "D": pruned((16, 24), 0.3)}
    model = saved(tmp_path, **tensors, B=sparse_codes())
    written = export_sparse(model, tmp_path / "out", layout)
    assert json.loads((tmp_path / "out" / INDEX).read_text()) == {"format": layout, "matrices": written}
    files = {entry["name"]: tmp_path / "out" / entry["file"] for entry in written}
    assert set(files) == {"W", "H", "B"}
    np.testing.assert_array_equal(dense_of(files["W"]), tensors["W"])
    np.testing.assert_array_equal(dense_of(files["H"]), tensors["H"].astype(np.float32))
    expected = matmul_reference.dequantize(sparse.expand(sparse_codes()))
    np.testing.assert_array_equal(dense_of(files["B"]), expected)
    assert {entry["name"]: entry["values"] for entry in written}["W"] == np.count_nonzero(tensors["W"])


@pytest.mark.parametrize("layout", FORMATS)
def test_scipy_reads_them(tmp_path: Path, layout: SparseFormat) -> None:
    scipy_sparse = pytest.importorskip("scipy.sparse")
    weight = pruned((40, 24), 0.6)
    export_sparse(saved(tmp_path, W=weight), tmp_path / "out", layout)
    found = scipy_sparse.load_npz(tmp_path / "out" / "0000.npz")
    assert found.format == layout
    found.check_format()
    np.testing.assert_array_equal(found.toarray(), weight)


def test_nothing_sparse_and_a_folder_in_use_are_refused(tmp_path: Path) -> None:
    model = saved(tmp_path, W=pruned((40, 24), 0.3))
    with pytest.raises(UsageError, match="no matrix of the model"):
        export_sparse(model, tmp_path / "out", "csr")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="is not empty"):
        export_sparse(model, tmp_path, "csr")


def test_a_damaged_weight_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a sparse weight is damaged") as caught:
        export_sparse(saved(tmp_path, B=sparse_codes()[:-1]), tmp_path / "out", "csr")
    assert caught.value.where == "tensor 'B'"
