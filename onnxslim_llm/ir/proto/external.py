"""Where the files of a model are: the model itself, and its external tensors; checked before anything is read."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path, PurePosixPath, PureWindowsPath

from onnx import TensorProto

from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.ir.weights import dtypes
from onnxslim_llm.ir.weights.mapping import MappedFile
from onnxslim_llm.ir.weights.stored import MappedWeight

__all__ = ["ExternalFiles", "resolve_model_path"]

_AGAIN = "export the model again"


class ExternalFiles:
    """The weight files of one model.

    Args:
        folder: The folder of the model file. External locations are relative to it and may not leave it; None if the
            model is not from a file, and then it may have no external tensors.
        model: The model file, if it may be a symbolic link: then the data files may be links to the folder where the
            model really is, as in the cache of the Hugging Face hub.
    """

    def __init__(self, folder: Path | None, model: Path | None = None) -> None:
        self.folder = folder
        self._homes = [] if folder is None else [os.path.realpath(folder)]
        if model is not None:
            self._homes.append(os.path.dirname(os.path.realpath(model)))
        self._files: dict[str, MappedFile] = {}

    def weight(self, proto: TensorProto) -> MappedWeight:
        """Return the weight behind an external tensor. Checks bounds; reads nothing.

        Raises:
            ModelError: The location leaves the folder; the file is missing or too short; offset or length are no
                numbers, out of range, or do not fit the shape.
        """
        where = f"tensor '{proto.name}'"
        entries = {entry.key: entry.value for entry in proto.external_data}
        location = entries.get("location", "")
        file = self._file(location, where)
        where += f", file '{location}'"
        offset = _number(entries.get("offset", "0"), "offset", where)
        if proto.data_type == TensorProto.STRING:
            raise ModelError("string tensors cannot be stored externally", where=where, todo=_AGAIN)
        if dtypes.numpy_dtype(proto.data_type) is None:
            raise ModelError(
                f"unknown element type {proto.data_type}", where=where, todo="a newer onnx package may know it"
            )
        if any(dim < 0 for dim in proto.dims):
            raise ModelError(f"negative dimension in {list(proto.dims)}", where=where, todo=_AGAIN)
        needed = dtypes.packed_nbytes(proto.dims, proto.data_type)
        if "length" in entries:
            length = _number(entries["length"], "length", where)
            if length != needed:
                kind = dtypes.dtype_name(proto.data_type)
                raise ModelError(
                    f"external length {length} does not fit {kind} {list(proto.dims)}, which takes {needed} bytes",
                    where=where,
                    todo=_AGAIN,
                )
        if offset + needed > file.size:
            raise ModelError(
                f"external data is too short: bytes {offset} to {offset + needed} wanted, the file has {file.size}",
                where=where,
                todo="the file is incomplete: download or copy it again",
            )
        return MappedWeight(file, offset, tuple(proto.dims), proto.data_type, proto)

    def add(self, file: MappedFile) -> MappedFile:
        """Remember a file that is mapped already; returns it."""
        self._files[str(file.path)] = file
        return file

    def _file(self, location: str, where: str) -> MappedFile:
        if self.folder is None:
            raise ModelError(
                "the model has external data, but it is not known in which folder",
                where=where,
                todo="open the model from its file, or give base_dir",
            )
        path = self._resolve(self.folder, location, where)
        known = self._files.get(str(path))
        if known is None:
            try:
                known = MappedFile(path)
            except OSError as error:
                raise ModelError(
                    f"external data cannot be opened: {error.strerror}",
                    where=f"{where}, file '{location}'",
                    todo="put the file beside the model",
                ) from error
            self._files[str(path)] = known
        return known

    def _resolve(self, folder: Path, location: str, where: str) -> Path:
        refuse = ModelError(
            "external data outside of the model's folder is refused",
            where=f"{where}, location '{location}'",
            todo="copy the model and its data files (no symbolic links) into one folder",
        )
        if not location or "\0" in location:
            raise ModelError("external tensor without a location", where=where, todo=_AGAIN)
        absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor
        if absolute or os.path.normpath(location).split("/")[0] == "..":
            raise refuse
        target = os.path.realpath(folder / location)
        if not any(os.path.commonpath([home, target]) == home for home in self._homes):
            raise refuse
        path = Path(target)
        if path.exists() and not path.is_file():
            raise ModelError("external data is not a regular file", where=f"{where}, file '{location}'", todo=_AGAIN)
        return path


def _number(text: str, what: str, where: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ModelError(f"external {what} '{text}' is no non-negative number", where=where, todo=_AGAIN)
    return int(text)


#: What a folder that `compile` has written holds besides other models, if any.
_ARTIFACT_MODEL, _ARTIFACT_MANIFEST = "model.onnx", "manifest.json"


def resolve_model_path(path: str | Path) -> Path:
    """Return the ONNX file that `path` means: the file itself, or the one model (or the one decoder) in a folder.

    A folder may keep its models in a subfolder `onnx`. One of ours may hold further graphs, and what a vendor's
    compiler made of them: then it means its model.onnx.

    Raises:
        UsageError: There is no such file, or the folder holds no model or several.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        near = get_close_matches(path.name, siblings, n=1)
        todo = f"did you mean '{near[0]}'?" if near else "give an .onnx file, or a folder with one"
        raise UsageError("no such file", where=str(path), todo=todo)
    if not path.is_dir():
        raise UsageError("not a regular file", where=str(path), todo="give an .onnx file")
    models = sorted(path.glob("*.onnx")) or sorted(path.glob("onnx/*.onnx"))
    models = [item for item in models if item.is_file()]
    decoders = [item for item in models if "decoder" in item.name]
    for candidates in (models, decoders):
        if len(candidates) == 1:
            return candidates[0]
    first = path / _ARTIFACT_MODEL
    if first in models and (path / _ARTIFACT_MANIFEST).is_file():
        return first
    if not models:
        raise UsageError("the folder holds no .onnx file", where=str(path), todo="give an .onnx file")
    names = ", ".join(item.name for item in models)
    raise UsageError(f"the folder holds several models: {names}", where=str(path), todo="give the path of one of them")
