"""Time and memory of compiling 1.1 B float16 parameters (2.2 GB) to int4, against ONNX Runtime's quantizer.

    python benchmarks/compile/large_model.py --folder DIR [--rounds 3] [--preset 1.1b]

In one run, interleaved: (a) the whole command `onnxslim-llm compile --verify off`, from interpreter start to the
published artifact, hashes and report included; (b) onnxruntime's MatMulNBitsQuantizer (RTN in C++, block 32, symmetric)
on the same file; (c) the physical limit: the native quantizer alone, weights from the mapped file to an output file, no
graph; (d) reading the file and writing a quarter of it, no arithmetic. Every run is its own process; wall time and peak
resident memory are the operating system's. Prints JSON with medians and ratios.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx

HERE = Path(__file__).resolve().parent
BLOCK = 32


def run(arguments: list[str]) -> tuple[float, int]:
    """Run a command; return wall seconds and peak resident bytes.

    Raises:
        SystemExit: It failed.
    """
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        child = subprocess.Popen(arguments, stdout=said, stderr=said)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(arguments)} failed:\n{said.read().decode(errors='replace')[-2000:]}")
    return seconds, usage.ru_maxrss * 1024


def quantize_with_onnxruntime(model: Path, out: Path) -> None:
    """What a user of onnxruntime does: load, quantize, save."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, accuracy_level=4)
    quantizer = MatMulNBitsQuantizer(onnx.load(model), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(out), use_external_data_format=True)


def quantize_without_a_graph(model: Path, out: Path, threads: int) -> None:
    """The limit: the native quantizer over the mapped file, codes and scales written to one file."""
    from onnxslim_llm.custom_ops.quantize import BlockSpec, Layout, quantize_tile

    proto = onnx.load(model, load_external_data=False)
    readers = {name for node in proto.graph.node if node.op_type == "MatMul" for name in node.input}
    spec = BlockSpec(bits=4, block=BLOCK, symmetric=True)
    tasks, end = [], 0
    for tensor in proto.graph.initializer:
        if tensor.name not in readers or tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        place = {e.key: e.value for e in tensor.external_data}
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        shape = tuple(tensor.dims)
        array = np.memmap(model.parent / place["location"], dtype, "r", int(place["offset"]), shape)
        width = max(64, (32 << 20) // (shape[0] * dtype.itemsize) // 64 * 64)
        for start in range(0, shape[1], width):
            stop = min(start + width, shape[1])
            tasks.append((array[:, start:stop], end))
            end += (stop - start) * (-(-shape[0] // BLOCK)) * (BLOCK // 2 + 4)
    with out.open("wb") as file:
        file.truncate(end)

        def work(task: tuple[np.ndarray, int]) -> None:
            view, offset = task
            result = quantize_tile(view, spec, "rtn", layout=Layout.NBITS)
            os.pwrite(file.fileno(), result.codes.tobytes(), offset)
            os.pwrite(file.fileno(), result.scales.tobytes(), offset + result.codes.nbytes)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, tasks))


def read_and_write(model: Path, out: Path) -> None:
    """Read the weights through a buffer and write a quarter as many bytes."""
    buffer = bytearray(8 << 20)
    with (
        (model.parent / (model.name + ".data")).open("rb", buffering=0) as source,
        out.open("wb", buffering=0) as target,
    ):
        while count := source.readinto(buffer):
            target.write(memoryview(buffer)[: count // 4])


def digest(folder: Path) -> str:
    """SHA-256 over the artifact's model files."""
    found = hashlib.sha256()
    for name in ("model.onnx", "model.onnx.data"):
        found.update((folder / name).read_bytes())
    return found.hexdigest()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the model and the results (6 GB free)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preset", default="1.1b")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    model, out = args.folder / "model.onnx", args.folder / "out"
    if args.only:
        work = {"ort": quantize_with_onnxruntime, "copy": read_and_write}
        if args.only == "limit":
            quantize_without_a_graph(model, out / "limit.bin", 2)
        else:
            work[args.only](model, out / args.only)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    if not model.exists():
        run(
            [
                sys.executable,
                str(HERE.parent / "reference_decoder.py"),
                str(model),
                "--preset",
                args.preset,
                "--dtype",
                "float16",
            ]
        )
    this = [sys.executable, __file__, "--folder", str(args.folder), "--only"]
    ours = [sys.executable, "-m", "onnxslim_llm", "compile", str(model), "--verify", "off", "--target", "ort-cpu", "-q"]
    ours += ["--recipe", str(HERE / "rtn.toml"), "--force"]
    commands = {
        "onnxslim-llm": [*ours, "-o", str(out / "ours"), "--jobs", "2"],
        "onnxruntime": [*this, "ort"],
        "limit": [*this, "limit"],
        "copy": [*this, "copy"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    memory: dict[str, list[int]] = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, command in commands.items():
            if name != "onnxslim-llm":
                shutil.rmtree(out / "scratch", ignore_errors=True)
            out.mkdir(exist_ok=True)
            wall, peak = run(command)
            seconds[name].append(wall)
            memory[name].append(peak)
            for leftover in out.glob("ort*"):
                leftover.unlink()
    two = digest(out / "ours")
    run([*ours, "-o", str(out / "ours"), "--jobs", "1"])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "seconds": {name: [round(v, 2) for v in values] for name, values in seconds.items()},
        "peak_rss_mb": {name: round(max(values) / 1e6) for name, values in memory.items()},
        "ratio_to_onnxruntime": round(medians["onnxslim-llm"] / medians["onnxruntime"], 3),
        "ratio_to_limit": round(medians["onnxslim-llm"] / medians["limit"], 2),
        "same_bytes_with_1_and_2_jobs": two == digest(out / "ours"),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
