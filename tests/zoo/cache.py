"""Exports run once: results lie in a folder that is keyed by the configuration, the exporter and all versions."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from zoo import (
    dynamo_cache_exporter,
    dynamo_exporter,
    eager_exporter,
    genai_exporter,
    optimum_exporter,
    sample_inputs,
    script_exporter,
    weights,
)
from zoo.families import Family

__all__ = ["EXPORTERS", "Export", "export", "package_versions"]

EXPORTERS: dict[str, Callable[[Family, Path], None]] = {
    "optimum": optimum_exporter.export,
    "optimum-eager": eager_exporter.export,
    "dynamo": dynamo_exporter.export,
    "dynamo-cache": dynamo_cache_exporter.export,
    "script": script_exporter.export,
    "genai": genai_exporter.export,
}

_PACKAGES = ("torch", "transformers", "optimum", "optimum-onnx", "onnx", "onnxscript", "onnxruntime-genai", "numpy")
_FAILURE = "failure.txt"


@dataclass(frozen=True)
class Export:
    """What an exporter made of a family.

    Attributes:
        folder: its files.
        failure: the exporter's message if it cannot, else "".
    """

    folder: Path
    failure: str = ""

    def path(self, part: str = "model") -> Path:
        """The ONNX file of `part`."""
        return self.folder / f"{part}.onnx"


def export(family: Family, exporter: str) -> Export:
    """Export `family`, or find the export of an earlier run.

    The folder is $ONNXSLIM_LLM_ZOO, or onnxslim-llm/zoo in the user's cache folder.
    """
    folder = _root() / f"{family.name}-{exporter}-{_key(family, exporter)}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            _run(family, exporter, scratch)
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was faster otherwise
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    failure = folder / _FAILURE
    return Export(folder, failure.read_text(encoding="utf-8") if failure.is_file() else "")


def _run(family: Family, exporter: str, folder: Path) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            EXPORTERS[exporter](family, folder)
        except Exception as error:  # whatever an exporter raises is its answer
            (folder / _FAILURE).write_text(_message(error).replace(str(folder), "..."), encoding="utf-8")


def _message(error: BaseException) -> str:
    """The first line of the innermost cause: exporters wrap it in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}"


def _root() -> Path:
    given = os.environ.get("ONNXSLIM_LLM_ZOO")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnxslim-llm" / "zoo"


def _key(family: Family, exporter: str) -> str:
    sources = [inspect.getsource(module) for module in (weights, sample_inputs, inspect.getmodule(EXPORTERS[exporter]))]
    made_of = [family.name, family.model, family.config, family.kind, family.task]
    facts = [made_of, package_versions(), sources]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def package_versions() -> dict[str, str]:
    """Versions of everything that an export depends on, "" for what is not installed."""
    return {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
