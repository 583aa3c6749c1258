"""Targets: what each runtime accepts, and how an artifact is opened in it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points

from onnxslim_llm.errors import UsageError, did_you_mean
from onnxslim_llm.targets.base import Target, Violation
from onnxslim_llm.targets.ort_cpu import ORT_CPU
from onnxslim_llm.targets.ort_cpu_ops import ORT_CPU_OPS
from onnxslim_llm.targets.portable import PORTABLE
from onnxslim_llm.targets.qnn_htp import QNN_HTP

__all__ = ["TARGETS", "Target", "Violation", "all_targets", "get_target"]

#: The project's own targets; the first one is the default.
TARGETS: tuple[Target, ...] = (PORTABLE, ORT_CPU, ORT_CPU_OPS, QNN_HTP)


@cache
def all_targets() -> Mapping[str, Target]:
    """Return every known target by name: the project's own, and those of entry points `onnxslim_llm.targets`.

    Raises:
        UsageError: A third-party target cannot be imported, is none, or takes a name that exists.
    """
    found = {target.name: target for target in TARGETS}
    for entry in entry_points(group="onnxslim_llm.targets"):
        todo = "repair or uninstall the package that brings it"
        try:
            plugin = entry.load()
        except Exception as error:  # a broken plug-in is the user's to remove, whatever it raises
            what = f"the target plug-in '{entry.name}' cannot be imported: {error}"
            raise UsageError(what, where=entry.value, todo=todo) from error
        if not isinstance(plugin, Target):
            raise UsageError(f"the target plug-in '{entry.name}' is no Target", where=entry.value, todo=todo)
        if plugin.name in found:
            raise UsageError(f"two targets are called '{plugin.name}'", where=entry.value, todo=todo)
        found[plugin.name] = plugin
    return found


def get_target(name: str) -> Target:
    """Return the target `name`.

    Raises:
        UsageError: There is none.
    """
    known = all_targets()
    if name not in known:
        raise UsageError(f"unknown target '{name}'", todo=did_you_mean(name, known))
    return known[name]
