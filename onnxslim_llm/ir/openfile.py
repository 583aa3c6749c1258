"""From a path to a parsed ModelProto whose large tensors stayed in the file."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from onnxslim_llm.errors import ModelError, ResourceError, UsageError
from onnxslim_llm.ir.mapping import MappedFile
from onnxslim_llm.ir.reader import InlineMap
from onnxslim_llm.ir.wire import WireError, strip_raw_data

__all__ = ["parse_file", "resolve_model_path"]

_LFS = b"version https://git-lfs"
_AGAIN = "download or export it again"


def resolve_model_path(path: str | Path) -> Path:
    """Return the ONNX file that `path` means: the file itself, or the one model (or the one decoder) in a folder.

    A folder may keep its models in a subfolder `onnx`.

    Raises:
        UsageError: There is no such file, or the folder holds no model or several.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        raise UsageError("no such file", where=str(path), todo="give the path of an .onnx file, or of a folder with one")
    if not path.is_dir():
        raise UsageError("not a regular file", where=str(path), todo="give the path of an .onnx file")
    models = sorted(path.glob("*.onnx")) or sorted(path.glob("onnx/*.onnx"))
    models = [item for item in models if item.is_file()]
    decoders = [item for item in models if "decoder" in item.name]
    for candidates in (models, decoders):
        if len(candidates) == 1:
            return candidates[0]
    if not models:
        raise UsageError("the folder holds no .onnx file", where=str(path), todo="give the path of an .onnx file")
    names = ", ".join(item.name for item in models)
    raise UsageError(f"the folder holds several models: {names}", where=str(path), todo="give the path of one of them")


def parse_file(path: Path) -> tuple[onnx.ModelProto, InlineMap]:
    """Parse an ONNX file; raw data of large tensors is left in it and marked.

    Raises:
        ModelError: The file is empty, truncated, or no ONNX model.
        ResourceError: It cannot be read.
    """
    where = str(path)
    try:
        file = MappedFile(path)
    except OSError as error:
        raise ResourceError(f"cannot read the model: {error.strerror}", where=where, todo="check its permissions") from error
    if file.size == 0:
        raise ModelError("the file is empty", where=where, todo=_AGAIN)
    inline = InlineMap(os.urandom(16), file)
    data = memoryview(file.read(0, file.size))
    if bytes(data[: len(_LFS)]) == _LFS:
        raise ModelError("the file is a Git LFS pointer, not the model", where=where, todo="run 'git lfs pull'")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(strip_raw_data(data, inline.mark))
    except WireError as error:
        what = "the file is truncated or no ONNX model" if error.truncated else "not an ONNX model"
        raise ModelError(f"{what}: {error}", where=where, todo=_AGAIN) from error
    except DecodeError as error:
        raise ModelError(f"not an ONNX model: {error}", where=where, todo=_AGAIN) from error
    finally:
        del data
        file.release(0, file.size)
    return proto, inline
