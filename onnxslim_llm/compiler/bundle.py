"""The operator library in the artifact's folder, for runtimes that look for it there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from onnxslim_llm.custom_ops import ops
from onnxslim_llm.errors import ResourceError
from onnxslim_llm.ir.model import open_model
from onnxslim_llm.runtime.genai_config import GENAI_CONFIG_NAME

__all__ = ["bundle_operators", "check_library"]

_GENAI_OPTION = "custom_ops_library"
_REINSTALL = "reinstall onnxslim-llm with a C++ compiler, or compile for the target ort-cpu"


def check_library(wanted: bool) -> None:
    """Check, before work is spent, that there is a library to bundle.

    Raises:
        ResourceError: It was not built here.
    """
    if wanted and ops.library_path() is None:
        raise ResourceError(f"{ops.LIBRARY_NAME} was not built here", where="--bundle-ops", todo=_REINSTALL)


def bundle_operators(artifact: Path, wanted: bool) -> tuple[list[str], list[str]]:
    """Copy the library beside the artifact's model if that has our operators, and name it in genai_config.json.

    Args:
        artifact: The artifact's .onnx file.
        wanted: Whether the library is to be copied; otherwise only the remark that it is needed is made.

    Returns:
        Names of the files copied, and remarks.

    Raises:
        ResourceError: The library was not built here.
        OSError: A file cannot be written.
    """
    config = artifact.parent / GENAI_CONFIG_NAME
    if open_model(artifact).opset(ops.DOMAIN) is None:
        _name_in_config(config, None)
        return [], ["--bundle-ops: the artifact has none of our operators"] if wanted else []
    if not wanted:
        return [], [f"the artifact needs {ops.LIBRARY_NAME}: `register_custom_ops` here, --bundle-ops for elsewhere"]
    library = ops.library_path()
    if library is None:
        raise ResourceError(f"{ops.LIBRARY_NAME} was not built here", where="--bundle-ops", todo=_REINSTALL)
    shutil.copyfile(library, artifact.parent / ops.LIBRARY_NAME)
    _name_in_config(config, ops.LIBRARY_NAME)
    return [ops.LIBRARY_NAME], []


def _name_in_config(path: Path, library: str | None) -> None:
    """Let onnxruntime-genai load the library, which it looks for in the model's folder; None: let it not."""
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        options = content["model"]["decoder"].setdefault("session_options", {})
        options.get(_GENAI_OPTION)
    except (ValueError, KeyError, TypeError, AttributeError):  # the source's own, of another form: left as it is
        return
    if library is not None:
        options[_GENAI_OPTION] = library
    elif options.get(_GENAI_OPTION) == ops.LIBRARY_NAME:  # from a source that needed it
        del options[_GENAI_OPTION]
    else:
        return
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
