"""Inputs that the user gives as numpy files."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from onnxslim_llm.errors import UsageError
from onnxslim_llm.runtime.session import Array, TensorInfo
from onnxslim_llm.verify.cases import TensorCase

__all__ = ["load_arrays"]


def load_arrays(path: Path, inputs: Sequence[TensorInfo]) -> list[TensorCase]:
    """Read user-given inputs: one case a file.

    Raises:
        UsageError: a file is unreadable, or names, ranks, sizes or types do not fit the model's inputs.
    """
    files = sorted(p for p in path.iterdir() if p.suffix in (".npz", ".npy")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise UsageError("no .npz or .npy file found", where=str(path))
    return [TensorCase(file.name, _fit(_read(file, inputs), inputs, file)) for file in files]


def _read(file: Path, inputs: Sequence[TensorInfo]) -> dict[str, Array]:
    try:
        loaded: Any = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            if len(inputs) != 1:
                raise UsageError(f"the model has {len(inputs)} inputs; an .npy holds one", where=str(file))
            return {inputs[0].name: loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:  # its text proposes to load it unsafely
        todo = "write it with numpy.savez(FILE, NAME=ARRAY, ...); arrays of Python objects are not read"
        raise UsageError("not a readable numpy file", where=str(file), todo=todo) from error


def _fit(arrays: Mapping[str, Array], inputs: Sequence[TensorInfo], file: Path) -> dict[str, Array]:
    names = {info.name for info in inputs}
    if names != set(arrays):
        raise UsageError(
            f"the file has {', '.join(sorted(arrays)) or 'nothing'}; the model takes {', '.join(sorted(names))}",
            where=str(file),
            todo="write it with numpy.savez(FILE, NAME=ARRAY, ...), one array for every input of the model",
        )
    fitted = {}
    for info in inputs:
        array = arrays[info.name]
        if info.dtype is not None and array.dtype != info.dtype:
            if info.dtype.kind != array.dtype.kind:
                what = f"input '{info.name}' is {info.kind}, the file has {array.dtype}"
                raise UsageError(what, where=str(file), todo="convert the array with .astype() before it is written")
            array = array.astype(info.dtype)
        wanted = info.shape or ()
        same_rank = len(wanted) == array.ndim or not wanted  # ONNX Runtime tells an unknown rank as a scalar
        if not same_rank or any(isinstance(d, int) and d != n for d, n in zip(wanted, array.shape, strict=False)):
            what = f"input '{info.name}' has the shape {list(wanted)}, the file {list(array.shape)}"
            raise UsageError(
                what, where=str(file), todo="write arrays of the model's sizes; --shape fixes symbolic ones"
            )
        fitted[info.name] = array
    return fitted
