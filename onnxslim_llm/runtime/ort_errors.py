"""What ONNX Runtime says when it fails, as errors that name the node and say what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from onnxslim_llm.errors import ModelError, ResourceError, SlimError

__all__ = ["UNREGISTERED", "ort_errors"]

# ORT's texts differ by phase (load, type check, run); each of these finds the node or op that is concerned.
_WHERE = (
    re.compile(r"running (?P<op>\w+) node\. Name:'(?P<node>[^']*)'"),
    re.compile(r"In Node, \(\"(?P<node>[^\"]*)\", (?P<op>\w+)"),
    re.compile(r"operator \((?P<op>\w+)\) in node \((?P<node>[^)]*)\)"),
    re.compile(r"Could not find an implementation for (?P<op>\S+) node with name '(?P<node>[^']*)'"),
    re.compile(r"Node ?\((?P<node>[^)]*)\) Op \((?P<op>\w+)\)"),
    re.compile(r"Fatal error: (?P<op>\S+?)\(-?\d+\) is not a registered"),
    re.compile(r"for initializer: (?P<node>\S+?)\.? "),
)
UNREGISTERED = re.compile(r"is not a registered function/op|No Op registered")
_NO_MEMORY = re.compile(r"Failed to allocate memory|bad_alloc|bad allocation|out of memory", re.IGNORECASE)
_NOISE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : |/onnxruntime_src/\S+ ")
_MORE_MEMORY = "free memory, or use a smaller model, batch or window"


@contextmanager
def ort_errors(where: str, phase: str) -> Iterator[None]:
    """Raise what ONNX Runtime says as an error of ours.

    Args:
        where: the model.
        phase: "open" or "run".

    Raises:
        ModelError: it fails on the model; the node is named where the text tells it.
        ResourceError: memory ran out.
    """
    try:
        yield
    except SlimError:
        raise
    except MemoryError as error:
        raise ResourceError("memory ran out", where=where, todo=_MORE_MEMORY) from error
    except Exception as error:
        raise _translate(str(error), where, phase) from error


def _translate(text: str, where: str, phase: str) -> SlimError:
    message = " ".join(_NOISE.sub("", text).split())
    found = next((m for m in (pattern.search(message) for pattern in _WHERE) if m), None)
    if found:
        groups = found.groupdict()
        named = " ".join(part for part in (groups.get("op"), groups.get("node") and f"'{groups['node']}'") if part)
        where = f"{named} in {where}" if where else named
    if _NO_MEMORY.search(message):
        return ResourceError(f"memory ran out in ONNX Runtime: {message}", where=where, todo=_MORE_MEMORY)
    if phase == "open":
        todo = "check the model with `onnxslim-llm inspect`"
        if UNREGISTERED.search(message):
            todo = "register the library of this operator, or choose another target"
        return ModelError(f"ONNX Runtime cannot open the model: {message}", where=where, todo=todo)
    return ModelError(f"ONNX Runtime failed on the model: {message}", where=where)
