"""Saving when something is short or someone stops it: memory, disk, patience. Each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ir_jobs import TILE_BYTES, halved_model, write_weights

from onnxslim_llm.errors import ResourceError
from onnxslim_llm.ir.save import SaveOptions, save_model

PROGRAM = Path(__file__).with_name("ir_jobs.py")
MiB = 1 << 20


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("jobs", [1, 2])
def test_memory_does_not_follow_the_weight(jobs, tmp_path):
    rows, columns = 75 * 1024, 1024
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(rows * columns * 4)  # 300 MiB of zeros that take no disk
    process = start(tmp_path / "w.bin", tmp_path / "m.onnx", "--rows", rows, "--columns", columns, "--jobs", jobs)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    memory = json.loads(output.splitlines()[-1])
    # Of each tile in flight: its input pages, the float16 copy, and the sums in float64 steps. Threads and the page
    # tables of the map add a few MiB; the allocator may keep one more tile.
    allowed = (jobs + 1) * 3 * TILE_BYTES + 16 * MiB
    assert memory["peak"] - memory["before"] < allowed
    assert (tmp_path / "m.onnx.data").stat().st_size > 150 * MiB


def test_copies_and_transposes_do_not_follow_the_weight_either(tmp_path):
    rows, columns = 50 * 1024, 1024
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(rows * columns * 4)
    code = f"""
import sys
sys.path[:0] = {[str(PROGRAM.parent), str(PROGRAM.parents[2])]!r}
from pathlib import Path
from ir_jobs import model_of, peak_memory
from onnx import TensorProto
from onnxslim_llm.ir.save import SaveOptions, save_model
from onnxslim_llm.ir.weights import MappedFile, MappedWeight, ViewWeight
weight = MappedWeight(MappedFile(Path(sys.argv[1])), 0, ({rows}, {columns}), TensorProto.FLOAT)
before = peak_memory()
save_model(model_of(weight, ViewWeight.transpose(weight)), Path(sys.argv[2]), SaveOptions(jobs=2))
print(peak_memory() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "w.bin"), str(tmp_path / "m.onnx")],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert int(done.stdout) < 48 * MiB  # of 200 MiB: blocks of 4 MiB, copied, transposed, and packed


@pytest.mark.parametrize("units", [1, 2, 3])
def test_killed_and_resumed_gives_the_same_bytes(units, tmp_path):
    write_weights(tmp_path / "w.bin", 4096, 512)
    sizes = ("--rows", 1024, "--columns", 512, "--count", 4)
    (tmp_path / "whole").mkdir()
    whole = start(tmp_path / "w.bin", tmp_path / "whole" / "m.onnx", *sizes)
    output, errors = whole.communicate(timeout=120)
    assert whole.returncode == 0, errors
    statistics = json.loads(output.splitlines()[-1])["weights"]
    out = tmp_path / "m.onnx"
    killed = start(tmp_path / "w.bin", out, *sizes, "--journal", tmp_path / "journal", "--kill-after", units)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert not out.with_name("m.onnx.data").exists()
    again = start(tmp_path / "w.bin", out, *sizes, "--journal", tmp_path / "journal", "--jobs", 2)
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    report = json.loads(output.splitlines()[-1])
    assert report["resumed"] == [f"weight{index}" for index in range(units)]
    assert report["weights"] == statistics
    for name in ("m.onnx", "m.onnx.data"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_killed_in_the_middle_of_a_tile(tmp_path):
    write_weights(tmp_path / "w.bin", 16 * 1024, 512)
    sizes = ("--rows", 4096, "--columns", 512, "--count", 4)
    out = tmp_path / "m.onnx"
    process = start(tmp_path / "w.bin", out, *sizes, "--journal", tmp_path / "journal", "--slow", 0.1)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.35)
    process.kill()
    process.communicate(timeout=60)
    assert not out.exists()
    again = start(tmp_path / "w.bin", out, *sizes, "--journal", tmp_path / "journal")
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    whole = start(tmp_path / "w.bin", tmp_path / "whole.onnx", *sizes)
    whole.communicate(timeout=120)
    assert out.with_name("m.onnx.data").read_bytes() == (tmp_path / "whole.onnx.data").read_bytes()


def test_a_full_disk_is_met_before_the_work(tmp_path):
    write_weights(tmp_path / "w.bin", 1024, 1024)
    process = start(
        tmp_path / "w.bin", tmp_path / "m.onnx", "--rows", 1024, "--columns", 1024, "--slow", 60,
        "--limit-file", MiB,
    )  # fmt: skip
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "ResourceError: cannot write: File too large" in errors
    assert sorted(os.listdir(tmp_path)) == ["w.bin"]


def test_a_really_full_disk(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mount)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("may not mount a file system here")
    try:
        write_weights(tmp_path / "w.bin", 1024, 1024)
        with pytest.raises(ResourceError, match="the disk is full"):
            save_model(halved_model(tmp_path / "w.bin", 1, 1024, 1024), mount / "m.onnx")
        assert os.listdir(mount) == []
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_disk_that_fills_up_during_the_work(tmp_path, monkeypatch):
    write_weights(tmp_path / "w.bin", 1024, 1024)
    monkeypatch.delattr(os, "posix_fallocate")  # as on file systems that cannot reserve
    real = os.pwrite
    written = 0

    def until_full(descriptor, data, offset):
        nonlocal written
        written += len(data)
        if written > MiB:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", until_full)
    with pytest.raises(ResourceError, match="the disk is full"):
        save_model(halved_model(tmp_path / "w.bin", 1, 1024, 1024), tmp_path / "m.onnx", SaveOptions(jobs=2))
    assert sorted(os.listdir(tmp_path)) == ["w.bin"]


def test_no_permission(tmp_path):
    write_weights(tmp_path / "w.bin", 1024, 1024)
    with pytest.raises(ResourceError, match="cannot write: No such file"):
        save_model(halved_model(tmp_path / "w.bin", 1, 1024, 1024), tmp_path / "nowhere" / "m.onnx")
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write: Not a directory"):
        save_model(halved_model(tmp_path / "w.bin", 1, 1024, 1024), tmp_path / "file" / "m.onnx")


@pytest.mark.parametrize("jobs", [1, 2])
def test_interrupts_stop_promptly(jobs, tmp_path):
    write_weights(tmp_path / "w.bin", 64 * 1024, 64)
    model = halved_model(tmp_path / "w.bin", 64, 1024, 64, slow=0.05)  # 3.2 s of tiles of 50 ms
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    begun = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        save_model(model, tmp_path / "m.onnx", SaveOptions(jobs=jobs))
    assert time.monotonic() - begun < 1.3
    assert not any(thread.name.startswith("save") for thread in threading.enumerate())
    assert sorted(os.listdir(tmp_path)) == ["w.bin"]
