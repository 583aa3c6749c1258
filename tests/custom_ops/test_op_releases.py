"""One compiled library in several releases of ONNX Runtime: the table's entries are where `ort_table.h` says.

1.17 is the oldest that the library accepts, 1.18 to 1.23 are without the entries of 1.24, and the installed one runs in
all other tests.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from op_models import TYPES, Array, attributes, model, needs_library, packed_weight

from onnxslim_llm.custom_ops import matmul_reference, ops
from onnxslim_llm.custom_ops.matmul_reference import Accuracy, Epilogue
from onnxslim_llm.custom_ops.packed import PackedScheme

pytestmark = [needs_library, pytest.mark.slow]

RELEASES = ("1.17.3", "1.20.1", "1.23.2", "1.24.4")
TOO_OLD = "1.16.3"
CHECK = Path(__file__).resolve().parent / "op_release_check.py"
SCHEME = PackedScheme(rows=96, columns=40, bits=4, block=32)
INSTALL_SECONDS = 240


def python_with(release: str, folder: Path) -> Path:
    """The interpreter of a new environment with that release; skips where it cannot be installed."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    numpy = "numpy<2" if release < "1.19" else "numpy"  # built against the older interface
    install = [str(python), "-m", "pip", "install", "--quiet", f"onnxruntime=={release}", numpy]
    try:
        done = subprocess.run(install, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"onnxruntime {release} cannot be installed: the package index does not answer")
    if done.returncode:
        pytest.skip(f"onnxruntime {release} cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")
    return python


def put(folder: Path, name: str, proto: onnx.ModelProto, **arrays: Array) -> None:
    (folder / f"{name}.onnx").write_bytes(proto.SerializeToString())
    if arrays:
        np.savez(folder / f"{name}.npz", **arrays)


def with_body(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a function of the operator's name, whose body says 42: who computes can be told apart."""
    text = f"""<domain: "{ops.DOMAIN}", opset_import: ["" : 17]>
        GatherPacked <K, N, bits, block_size> (B, indices) => (Y) {{
            float_indices = Cast <to = 1> (indices)
            zero = Sub (float_indices, float_indices)
            axis = Constant <value_ints = [-1]> ()
            rows = Unsqueeze (zero, axis)
            answer = Constant <value_float = 42.0> ()
            Y = Add (rows, answer)
        }}"""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    made.functions.append(onnx.parser.parse_function(text))
    return made


def put_models(folder: Path) -> None:
    rng = np.random.default_rng(0)
    weight = packed_weight(SCHEME)
    for dtype, rows in ((np.float32, 3), (np.float16, 3), (np.float32, 400)):
        a = rng.standard_normal((rows, 96)).astype(dtype)
        residual = rng.standard_normal((rows, 40)).astype(dtype)
        kind = TYPES[a.dtype]
        plain = model("MatMulPacked", {"a": a}, {"B": weight}, kind, **attributes(SCHEME, accuracy="exact"))
        expected = matmul_reference.matmul(a, weight, Accuracy.EXACT)
        put(folder, f"plain_{kind}_{rows}", plain, a=a, expected=expected)
        order = ["a", "B", "", "r"]  # with an input left out in the middle
        given = {"a": a, "r": residual}
        added = model("MatMulPacked", given, {"B": weight}, kind, inputs=order, **attributes(SCHEME, accuracy="exact"))
        expected = matmul_reference.matmul(a, weight, Accuracy.EXACT, Epilogue(residual=residual))
        put(folder, f"residual_{kind}_{rows}", added, expected=expected, **given)
    indices = np.array([[0, -1, 5], [39, -40, 5]])
    float_type = TYPES[np.dtype(np.float32)]
    table = model("GatherPacked", {"i": indices}, {"B": weight}, float_type, inputs=["B", "i"], **attributes(SCHEME))
    put(folder, "table", table, i=indices, expected=matmul_reference.dequantize(weight).T[indices])
    put(folder, "FALLBACK_table", with_body(table), i=indices, expected=matmul_reference.dequantize(weight).T[indices])
    a = np.ones((2, 96), np.float32)
    short = model("MatMulPacked", {"a": a}, {"B": weight[:-1]}, float_type, **attributes(SCHEME))
    put(folder, "BAD_short", short)
    put(folder, "BAD_attribute", model("MatMulPacked", {"a": a}, {"B": weight}, float_type, **attributes(SCHEME, K=95)))
    put(folder, "BAD_dynamic", model("MatMulPacked", {"a": a, "B": weight}, {}, float_type, **attributes(SCHEME)))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    put_models(folder)
    return folder


def run_check(python: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(python), str(CHECK), str(ops.library_path()), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("release", RELEASES)
def test_the_library_runs(release: str, models: Path, tmp_path: Path) -> None:
    done = run_check(python_with(release, tmp_path / "venv"), models)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(":")[0] == release


def test_the_library_runs_in_the_installed_release(models: Path) -> None:
    done = run_check(Path(sys.executable), models)
    assert done.returncode == 0, done.stderr


def test_older_releases_get_an_error(tmp_path: Path) -> None:
    python = python_with(TOO_OLD, tmp_path / "venv")
    code = f"import onnxruntime as o; o.SessionOptions().register_custom_ops_library({str(ops.library_path())!r})"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert f"needs ONNX Runtime 1.17 or newer; this is {TOO_OLD}" in done.stderr
