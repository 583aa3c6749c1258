"""The environment block says what is really there."""

from __future__ import annotations

import platform
import subprocess
import sys

from onnxslim_llm.artifact.environment import package_version, read_environment, usable_cpus


def test_versions_are_the_installed_ones() -> None:
    import onnxruntime

    environment = read_environment(threads=3)
    assert environment.onnxruntime == onnxruntime.__version__
    assert environment.python == platform.python_version()
    assert environment.threads == 3
    assert read_environment().threads == usable_cpus() >= 1
    assert package_version("no-such-distribution") is None


def test_cpu_features_are_a_sorted_part_of_what_the_system_tells() -> None:
    with open("/proc/cpuinfo") as stream:
        words = set(stream.read().split())
    features = read_environment().cpu_features
    assert features == sorted(features)
    assert set(features) <= words


def test_no_runtime_is_imported() -> None:
    code = "import sys, onnxslim_llm.artifact.staging, onnxslim_llm.artifact.environment as e; e.read_environment(1)\n"
    code += "assert not {'onnx', 'onnxruntime', 'numpy', 'click', 'rich'} & sys.modules.keys(), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
