"""onnxslim-llm doctor."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import click

from onnxslim_llm.cli.output import Output, output_options

__all__ = ["command"]

State = Literal["ok", "optional", "missing"]
_NEEDED = (
    "onnx",
    "onnx-graphsurgeon",
    "numpy",
    "ml_dtypes",
    "networkx",
    "pydantic",
    "jinja2",
    "pygal",
    "rich",
    "click",
)
_EXTRAS = {
    "tokenizers": "text for eval and generate",
    "torch": "what needs gradients (extra `gradients`), and training and exporting the sample model",
    "llama-cpp-python": "eval of GGUF models",
}
_ENOUGH_DISK = 1 << 30
_EXIT_MISSING = 5


@dataclass(frozen=True)
class _Check:
    """One line: `missing` means that a compile does not work here."""

    name: str
    state: State
    text: str


@click.command("doctor")
@output_options
def command(output: Output) -> None:
    """Check what is installed here and whether it works; exit code 5 if a compile cannot."""
    from rich.text import Text

    from onnxslim_llm.report.tables import plain_table

    checks = [
        check
        for group in (_machine, _libraries, _native, _runtime, _extras, _consumers, _room)
        for check in _safely(group)
    ]
    marks = {"ok": Text("✓", "green"), "optional": Text("–", "yellow"), "missing": Text("✗", "red")}
    rows: list[list[Any]] = [[marks[check.state], check.name, check.text] for check in checks]
    healthy = all(check.state != "missing" for check in checks)
    output.result({"healthy": healthy, "checks": [asdict(c) for c in checks]}, plain_table(["", "what", ""], rows))
    if not healthy:
        raise click.exceptions.Exit(_EXIT_MISSING)


def _safely(group: Callable[[], list[_Check]]) -> list[_Check]:
    """A doctor must not die of what it looks for."""
    try:
        return group()
    except Exception as error:
        return [_Check(group.__name__.strip("_"), "missing", f"{type(error).__name__}: {error}")]


def _machine() -> list[_Check]:
    from onnxslim_llm.artifact.environment import cpu_features, cpu_name, usable_cpus

    python: State = "ok" if sys.version_info >= (3, 11) else "missing"
    features = " ".join(cpu_features()) or "no features known"
    return [
        _Check("python", python, f"{platform.python_version()} at {sys.executable}"),
        _Check("cpu", "ok", f"{cpu_name()}, {usable_cpus()} usable; {features}"),
    ]


def _libraries() -> list[_Check]:
    from onnxslim_llm import __version__
    from onnxslim_llm.artifact.environment import package_version

    versions = {name: package_version(name) for name in _NEEDED}
    lacking = [name for name, version in versions.items() if version is None]
    text = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    checks = [_Check("onnxslim-llm", "ok", __version__), _Check("libraries", "ok", text)]
    return checks + [_Check(name, "missing", f"pip install {name}") for name in lacking]


def _native() -> list[_Check]:
    from onnxslim_llm import custom_ops
    from onnxslim_llm.custom_ops import ops

    # Without it everything works, an order of magnitude slower: no reason to fail.
    library = ops.library_path()
    return [
        _Check("kernels", "ok" if custom_ops.available() else "optional", custom_ops.describe()),
        _Check("operators", "ok" if library else "optional", str(library or f"{ops.LIBRARY_NAME} was not built")),
    ]


def _runtime() -> list[_Check]:
    try:
        import onnxruntime
    except ImportError as error:
        return [_Check("onnxruntime", "missing", f"{error}; pip install onnxruntime")]
    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())
    return [_Check("onnxruntime", "ok", f"{onnxruntime.__version__}, providers {providers}")]


def _extras() -> list[_Check]:
    from onnxslim_llm.artifact.environment import package_version

    found: list[_Check] = []
    for name, use in _EXTRAS.items():
        version = package_version(name)
        found.append(_Check(name, "ok" if version else "optional", version or f"not installed; only for {use}"))
    return found


def _consumers() -> list[_Check]:
    """Programs that `targets --check` runs models in, and targets with tools of their own."""
    from onnxslim_llm.consumers.consumer import CONSUMERS
    from onnxslim_llm.targets import all_targets

    known = [(consumer.title, consumer.installed()) for consumer in CONSUMERS if consumer.extra]
    known += [(f"target {t.name}", t.installed()) for t in all_targets().values() if t.extra]
    return [_Check(name, "ok" if there else "optional", text) for name, (there, text) in known]


def _room() -> list[_Check]:
    from onnxslim_llm.report.format import bytes_text

    here = Path.cwd()
    free = shutil.disk_usage(here).free
    writable = os.access(here, os.W_OK)
    disk: Any = "ok" if free >= _ENOUGH_DISK and writable else "optional"
    text = f"{bytes_text(free)} free in {here}" + ("" if writable else ", which is not writable")
    checks = [_Check("disk", disk, text)]
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        page = os.sysconf("SC_PAGE_SIZE")
        total, available = os.sysconf("SC_PHYS_PAGES") * page, _available_memory(page)
        checks.append(_Check("memory", "ok", f"{bytes_text(available)} available of {bytes_text(total)}"))
    return checks


def _available_memory(page: int) -> int:
    """Free memory and what the system gives back on demand (MemAvailable), in bytes."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * page
