"""A C program finds the installed operators with CMake and registers them in a session of the real runtime."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import onnxruntime
import pytest
from op_models import needs_library

from onnxslim_llm.custom_ops import ops

pytestmark = [needs_library, pytest.mark.slow]

PROJECT = """
cmake_minimum_required(VERSION 3.20)
project(consumer LANGUAGES C)
find_package(onnxslim_llm_ops REQUIRED)
add_executable(consumer consumer.c)
target_link_libraries(consumer PRIVATE onnxslim_llm::ops ${CMAKE_DL_LIBS})
"""

# The places of the table's entries are those of custom_ops/src/glue/ort_table.h.
PROGRAM = """
#include <dlfcn.h>
#include <stdio.h>
#include <onnxslim_llm_ops.h>

struct OrtApiBase { const void* const* (*get_api)(unsigned); const char* (*version)(void); };
enum { kGetErrorMessage = 2, kCreateSessionOptions = 10 };

int main(int count, char** arguments) {
    void* runtime = dlopen(arguments[1], RTLD_NOW);
    if (count != 2 || runtime == NULL) return 2;
    const OrtApiBase* (*get_base)(void) = (const OrtApiBase* (*)(void))dlsym(runtime, "OrtGetApiBase");
    const void* const* api = get_base()->get_api(17);
    OrtSessionOptions* options = NULL;
    OrtStatus* (*create)(OrtSessionOptions**) = (OrtStatus* (*)(OrtSessionOptions**))api[kCreateSessionOptions];
    if (create(&options) != NULL) return 3;
    OrtStatus* status = RegisterCustomOps(options, get_base());
    if (status != NULL) {
        puts(((const char* (*)(const OrtStatus*))api[kGetErrorMessage])(status));
        return 4;
    }
    if (RegisterCustomOps(options, get_base()) != NULL) return 5;
    printf("registered in %s\\n", get_base()->version());
    return 0;
}
"""


def test_a_c_program_registers_the_operators(tmp_path: Path) -> None:
    if shutil.which("cmake") is None or shutil.which("cc") is None:
        pytest.skip("needs cmake and a C compiler")
    try:
        folder = ops.cmake_folder()
    except RuntimeError:
        pytest.skip("needs an installed package: a checkout has no CMake package")
    (tmp_path / "CMakeLists.txt").write_text(PROJECT)
    (tmp_path / "consumer.c").write_text(PROGRAM)
    build = tmp_path / "build"
    configure = ["cmake", "-S", str(tmp_path), "-B", str(build), f"-Donnxslim_llm_ops_DIR={folder}"]
    for command in (configure, ["cmake", "--build", str(build)]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    runtime = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))
    done = subprocess.run([str(build / "consumer"), str(runtime)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, f"registered in {onnxruntime.__version__}"), done.stdout
