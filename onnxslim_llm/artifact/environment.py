"""The machine that compiled: library versions, CPU features and threads, read without importing a runtime."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from onnxslim_llm.artifact.manifest import Environment

__all__ = ["cpu_features", "cpu_name", "package_version", "read_environment", "usable_cpus"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The instruction sets that decide which matmul kernels run, as /proc/cpuinfo spells them (x86, then Arm).
_KERNEL_FEATURES = _names(
    "sse4_2 avx avx2 f16c fma avx512f avx512bw avx512_vnni avx512_bf16 avx512_fp16 avx_vnni amx_tile amx_int8 "
    "amx_bf16 asimd asimdhp asimddp i8mm bf16 sve sve2 sme"
)


def package_version(distribution: str) -> str | None:
    """The installed version of a distribution, or None; nothing is imported."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cpuinfo(*keys: str) -> str:
    """The first value of one of `keys` in /proc/cpuinfo; empty where there is no such file or key."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def cpu_features() -> list[str]:
    """The CPU's instruction sets that matter to the kernels, sorted; empty if the system does not tell."""
    return sorted(_KERNEL_FEATURES.intersection(_cpuinfo("flags", "Features").split()))


def cpu_name() -> str:
    """The CPU's name as the system tells it."""
    return _cpuinfo("model name", "Hardware", "CPU implementer") or platform.processor() or platform.machine()


def usable_cpus() -> int:
    """The number of CPUs that this process may run on (its affinity, not the machine's size)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_environment(threads: int | None = None) -> Environment:
    """The manifest's environment block; `threads` is what the compile used (default: the usable CPUs)."""
    return Environment(
        python=platform.python_version(),
        onnxruntime=package_version("onnxruntime"),
        onnx=package_version("onnx"),
        numpy=package_version("numpy"),
        cpu_features=cpu_features(),
        cpu=cpu_name(),
        platform=f"{platform.system()} {platform.machine()}",
        threads=threads or usable_cpus(),
    )
