"""The operators under AddressSanitizer and UBSan: what the other tests of them do, hostile models included."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from op_models import needs_library

pytestmark = [needs_library, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "custom_ops" / "src"
TESTS = ("test_op_hostile.py", "test_op_results.py", "test_op_concurrent.py", "test_op_sparse.py")
FLAGS = (
    *("-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-Wl,-z,nodelete"),
)
PLUGIN = """
from pathlib import Path
from onnxslim_llm.custom_ops import ops
ops.library_path = lambda: Path({library!r})

def pytest_sessionfinish(session):
    if {library!r} not in Path("/proc/self/maps").read_text():
        session.exitstatus = 9  # another library was tested
"""


def compiler() -> str:
    found = shutil.which("g++")
    if found is None:
        pytest.skip("needs g++")
    return found


def runtime_of(name: str) -> str:
    """A sanitizer's own library, which must be loaded before Python."""
    found = subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"this g++ comes without {name}")
    return path


def build(library: Path) -> None:
    """The glue with the scalar kernels: those of other instruction sets have sanitized tests of their own."""
    names = ("kernels/gather_packed", "kernels/matmul", "packing/packed_weight", "packing/sparse_weight")
    names += ("platform/instruction_set", "platform/kernel_isa")
    sources = [*(SOURCES / "glue").glob("*.cpp"), *(SOURCES / f"{name}.cpp" for name in names)]
    scalar = library.with_name("scalar.o")
    common = [compiler(), *FLAGS, f"-I{SOURCES}"]
    kernel = [*common[:1], *(f for f in common[1:] if f != "-shared"), "-DOSL_ISA=matmul_scalar", "-c"]
    for command in (
        [*kernel, str(SOURCES / "kernels" / "kernel_set.cpp"), "-o", str(scalar)],
        [
            *common,
            *map(str, sources),
            str(scalar),
            "-o",
            str(library),
        ],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-4000:]


def test_the_operators_are_clean(tmp_path: Path) -> None:
    preloaded = f"{runtime_of('libasan.so')}:{runtime_of('libubsan.so')}"
    library = tmp_path / "libsanitized.so"
    build(library)
    (tmp_path / "sanitized_plugin.py").write_text(PLUGIN.format(library=str(library)))
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    # Python itself keeps memory until it ends: that is no leak.
    environment = {**os.environ, "PYTHONPATH": path, "LD_PRELOAD": preloaded, "ASAN_OPTIONS": "detect_leaks=0"}
    tests = [str(Path(__file__).with_name(name)) for name in TESTS]
    # -P: the package that is tested, not the one in the folder beside it.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "sanitized_plugin", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert " passed" in done.stdout
