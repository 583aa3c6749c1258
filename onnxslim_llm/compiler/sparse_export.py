"""Sparse matrices for other tools: compressed rows or columns, as scipy saves them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.custom_ops import available, matmul_reference, ops, sparse, sparse_kernels
from onnxslim_llm.errors import ModelError, ResourceError, UsageError
from onnxslim_llm.ir.model import open_model
from onnxslim_llm.ir.weights import weight_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnxslim_llm.ir.model import Model

    Array = NDArray[Any]

__all__ = ["INDEX", "SparseFormat", "export_sparse"]

SparseFormat = Literal["csr", "csc"]
INDEX = "index.json"
"""File that says which tensor is in which .npz."""

#: Share of zeros from which on a matrix is worth a sparse file: below, places take more than zeros.
_LEAST_ZEROS = 0.5
_FLOATS = ("float64", "float32", "float16", "bfloat16")


def export_sparse(path: Path, folder: Path, layout: SparseFormat) -> list[dict[str, Any]]:
    """Write each matrix of a model that has at least half zeros to a file that `scipy.sparse.load_npz` reads.

    Few-bit weights of this package's operators that are stored sparse are written with the values that they stand for.
    Values are float32, or float64 where the model's are; places are int32 where they fit.

    Args:
        path: The model.
        folder: Where the files go; made if it is not there.
        layout: "csr" (by rows) or "csc" (by columns).

    Returns:
        What `INDEX` says: name, file, shape and stored values of each matrix.

    Raises:
        UsageError: The folder holds something already, or no matrix of the model is sparse.
        ModelError: A sparse weight is damaged.
        ResourceError: It cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError("the folder for sparse matrices is not empty", where=str(folder), todo="give another one")
    written: list[dict[str, Any]] = []
    try:
        for name, matrix in _matrices(open_model(path)):
            if 1 - np.count_nonzero(matrix) / matrix.size < _LEAST_ZEROS:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            file = f"{len(written):04d}.npz"
            stored = _write(folder / file, matrix, layout)
            written.append({"name": name, "file": file, "shape": list(matrix.shape), "values": stored})
        if written:
            (folder / INDEX).write_text(json.dumps({"format": layout, "matrices": written}, indent=2) + "\n")
    except OSError as error:
        what = f"cannot write sparse matrices: {error.strerror}"
        raise ResourceError(what, where=str(folder), todo="check space and permissions") from error
    if not written:
        what = "no matrix of the model has as many zeros as other values"
        raise UsageError(what, where=str(path), todo="prune the model first, e.g. with --recipe sparse")
    return written


def _matrices(model: Model) -> Iterator[tuple[str, Array]]:
    """Yield the weights with two axes, those of our operators as W[K, N]."""
    packed = {
        id(node.inputs[1])
        for graph in model.all_graphs()
        for node in graph.nodes
        if (node.domain, node.op) == (ops.DOMAIN, "MatMulPacked") and len(node.inputs) > 1
    }
    for constant in model.constants():
        if not isinstance(constant, gs.Constant):
            continue
        weight = weight_of(constant)
        if id(constant) in packed:
            data = weight.view()
            if sparse.is_sparse(data[: len(sparse.MAGIC)]):
                yield constant.name, matmul_reference.dequantize(_expanded(constant.name, data))
        elif len(weight.shape) == 2 and weight.size and str(weight.dtype) in _FLOATS:
            values = weight.view()
            yield constant.name, values if values.dtype == np.float64 else values.astype(np.float32)
            weight.release()


def _expanded(name: str, data: Array) -> Array:
    try:
        return sparse_kernels.expand(data) if available() else sparse.expand(data)
    except ValueError as error:
        todo = "compile the source again"
        raise ModelError(f"a sparse weight is damaged: {error}", where=f"tensor '{name}'", todo=todo) from error


def _write(file: Path, matrix: Array, layout: SparseFormat) -> int:
    """Write the arrays that scipy's `save_npz` writes, and return how many values there are."""
    lines = matrix if layout == "csr" else matrix.T
    _, inner = np.nonzero(lines)
    kind = np.int32 if max(matrix.size, inner.size) < 2**31 else np.int64
    starts = np.zeros(len(lines) + 1, kind)
    np.cumsum(np.count_nonzero(lines, axis=1), out=starts[1:])
    arrays: dict[str, Any] = {
        "indices": inner.astype(kind),
        "indptr": starts,
        "format": np.array(layout.encode()),
        "shape": np.array(matrix.shape),
        "data": lines[lines != 0],
    }
    np.savez_compressed(file, **arrays)
    return int(inner.size)
