"""Programs in C and C++ find the installed operators with CMake and register them in the real runtime.

In a checkout, which has no installed package, the operators are built and installed into a folder of the test.
"""

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
project(consumer LANGUAGES C CXX)
find_package(onnxslim_llm_ops REQUIRED)
add_executable(consumer consumer.c)
add_executable(consumer_cpp consumer.cpp)
target_link_libraries(consumer PRIVATE onnxslim_llm::ops ${CMAKE_DL_LIBS})
target_link_libraries(consumer_cpp PRIVATE onnxslim_llm::ops)
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


PROGRAM_CPP = """
#include <onnxslim_llm_ops.h>

int main() {
    OrtStatus* (*entry)(OrtSessionOptions*, const OrtApiBase*) = RegisterCustomOps;
    return entry == nullptr;
}
"""

ROOT = Path(__file__).resolve().parents[2]
BUILD_SECONDS = 500


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def package(folder: Path) -> Path:
    """The CMake package of this installation, or one that is made of the checkout."""
    try:
        return ops.cmake_folder()
    except RuntimeError:
        build, prefix = str(folder / "operators"), folder / "installed"
        run("cmake", "-S", str(ROOT / "custom_ops"), "-B", build, "-DCMAKE_BUILD_TYPE=Release")
        run("cmake", "--build", build, "--parallel", "2")
        run("cmake", "--install", build, "--prefix", str(prefix))
        return prefix / "onnxslim_llm" / "custom_ops" / "cmake"


def test_a_c_program_registers_the_operators(tmp_path: Path) -> None:
    if shutil.which("cmake") is None or shutil.which("cc") is None:
        pytest.skip("needs cmake and a C compiler")
    folder = package(tmp_path)
    (tmp_path / "CMakeLists.txt").write_text(PROJECT)
    (tmp_path / "consumer.c").write_text(PROGRAM)
    (tmp_path / "consumer.cpp").write_text(PROGRAM_CPP)
    build = str(tmp_path / "build")
    run("cmake", "-S", str(tmp_path), "-B", build, f"-Donnxslim_llm_ops_DIR={folder}")
    run("cmake", "--build", build)
    run(f"{build}/consumer_cpp")  # C linkage, and the library is found
    runtime = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))
    done = subprocess.run([f"{build}/consumer", str(runtime)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, f"registered in {onnxruntime.__version__}"), done.stdout
