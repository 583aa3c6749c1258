"""From a file to a parsed ModelProto whose large tensors stayed in the file."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from onnxslim_llm.errors import ModelError, ResourceError
from onnxslim_llm.ir.proto.tensors import InlineMap
from onnxslim_llm.ir.proto.wire import WireError, strip_raw_data
from onnxslim_llm.ir.weights.mapping import MappedFile

__all__ = ["parse_file"]

_LFS = b"version https://git-lfs"
_AGAIN = "download or export it again"


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
        what = f"cannot read the model: {error.strerror}"
        raise ResourceError(what, where=where, todo="check its permissions") from error
    if file.size == 0:
        raise ModelError("the file is empty", where=where, todo=_AGAIN)
    inline = InlineMap(os.urandom(16), file)
    data = memoryview(file.read(0, file.size).data)
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
