"""Where the artifact goes: what is there already is refused or replaced whole, and what cannot be written is told."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_checks import Outcome, model_bytes, nothing_left, refused, whole
from e2e_models import HOPELESS, decoder, mlp, save

Cli = Callable[..., Outcome]

FAST = ["--recipe", "int8", "--verify", "off"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(mlp(), tmp_path / "model.onnx")


@pytest.fixture
def old(here: Cli, tmp_path: Path, model: Path) -> dict[str, bytes]:
    """An older artifact in build/, made by another recipe; its files."""
    assert here("compile", model, "-o", "build", "--recipe", "safe", "--verify", "off").code == 0
    return everything(tmp_path / "build")


def everything(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_existing_artifact_is_refused(here: Cli, tmp_path: Path, model: Path, old: dict[str, bytes]) -> None:
    refused(here("compile", model, "-o", "build", *FAST), 2, "build", "--force")
    assert everything(tmp_path / "build") == old
    nothing_left(tmp_path, "build", "model.onnx")


def test_force_replaces_an_artifact_whole(here: Cli, tmp_path: Path, model: Path, old: dict[str, bytes]) -> None:
    done = here("compile", model, "-o", "build", "--force", *FAST)
    assert done.code == 0, done.err
    assert whole(tmp_path / "build")["recipe"]["name"] == "int8"
    nothing_left(tmp_path, "build", "model.onnx")


def test_force_leaves_no_file_of_the_old_artifact(here: Cli, tmp_path: Path) -> None:
    """The old one has external data and a tokenizer, the new one has neither."""
    big = save(decoder(vocab=4096, tied="transpose"), tmp_path / "big" / "model.onnx")
    (big.parent / "tokenizer.json").write_text("{}")
    assert here("compile", big, "-o", "build", "--recipe", "safe", "--verify", "off").code == 0
    assert {"model.onnx.data", "tokenizer.json"} <= set(os.listdir(tmp_path / "build"))
    assert here("compile", save(mlp(), tmp_path / "m.onnx"), "-o", "build", "--force", *FAST).code == 0
    whole(tmp_path / "build")
    assert set(os.listdir(tmp_path / "build")) == {"model.onnx", "manifest.json", "report.html"}


@pytest.mark.parametrize("what", ["thesis.txt", "sub/thesis.txt"])
def test_force_on_an_artifact_with_a_foreign_file_is_refused(
    here: Cli, tmp_path: Path, model: Path, old: dict[str, bytes], what: str
) -> None:
    (tmp_path / "build" / what).parent.mkdir(exist_ok=True)
    (tmp_path / "build" / what).write_text("five years of work")
    refused(here("compile", model, "-o", "build", "--force", *FAST), 2, "thesis.txt", "build")
    assert everything(tmp_path / "build") == {**old, what: b"five years of work"}


@pytest.mark.parametrize("manifest", [None, "{}", "not json", '{"tool": {"name": "other"}, "artifact": {"files": []}}'])
def test_force_on_a_foreign_folder_is_refused(here: Cli, tmp_path: Path, model: Path, manifest: str | None) -> None:
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "thesis.txt").write_text("five years of work")
    if manifest is not None:
        (tmp_path / "build" / "manifest.json").write_text(manifest)
    before = everything(tmp_path / "build")
    refused(here("compile", model, "-o", "build", "--force", *FAST), 2, "thesis.txt")
    assert everything(tmp_path / "build") == before
    nothing_left(tmp_path, "build", "model.onnx")


def test_force_never_removes_the_source(here: Cli, tmp_path: Path, old: dict[str, bytes]) -> None:
    """Compiling an artifact onto itself would replace what is being read."""
    for source in ("build", "build/model.onnx"):
        refused(here("compile", source, "-o", "build", "--force", *FAST), 2, "build")
        assert everything(tmp_path / "build") == old


def test_an_empty_folder_may_be_replaced_with_force(here: Cli, tmp_path: Path, model: Path) -> None:
    (tmp_path / "build").mkdir()
    refused(here("compile", model, "-o", "build", *FAST), 2, "--force")
    assert here("compile", model, "-o", "build", "--force", *FAST).code == 0
    whole(tmp_path / "build")


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_an_output_that_is_a_file(here: Cli, tmp_path: Path, model: Path, force: list[str]) -> None:
    (tmp_path / "build").write_text("notes")
    refused(here("compile", model, "-o", "build", *FAST, *force), 2, "build", "file")
    refused(here("compile", model, "-o", model, *FAST, *force), 2, "model.onnx", "file")
    assert (tmp_path / "build").read_text() == "notes"
    nothing_left(tmp_path, "build", "model.onnx")


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_an_output_below_a_file(here: Cli, tmp_path: Path, model: Path, force: list[str]) -> None:
    (tmp_path / "file").write_text("notes")
    refused(here("compile", model, "-o", "file/build", *FAST, *force), 5, "file", "-o")
    nothing_left(tmp_path, "file", "model.onnx")


def test_an_output_through_a_link(here: Cli, tmp_path: Path, model: Path) -> None:
    """A link to a folder is followed; one that leads nowhere is no folder to write into, or its target is made."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert here("compile", model, "-o", "link/build", *FAST).code == 0
    whole(tmp_path / "real" / "build")
    (tmp_path / "alias").symlink_to("real/build")
    refused(here("compile", model, "-o", "alias", *FAST), 2, "--force")
    assert here("compile", model, "-o", "alias", "--force", "--recipe", "safe", "--verify", "off").code == 0
    assert whole(tmp_path / "real" / "build")["recipe"]["name"] == "safe"
    assert (tmp_path / "alias").is_symlink()


def test_new_parents_are_made_and_removed_after_a_failure(here: Cli, tmp_path: Path, model: Path) -> None:
    refused(here("compile", model, "-o", "a/b/build", "--set", "quantize_weights.block=7"), 2, "block")
    nothing_left(tmp_path, "model.onnx")
    assert here("compile", model, "-o", "a/b/build", *FAST).code == 0
    whole(tmp_path / "a" / "b" / "build")
    nothing_left(tmp_path / "a" / "b", "build")


def test_a_name_that_is_too_long(here: Cli, tmp_path: Path, model: Path) -> None:
    refused(here("compile", model, "-o", "x" * 250, *FAST), 5, "name")
    refused(here("compile", model, "-o", "x" * 300, *FAST), 5, "name")
    nothing_left(tmp_path, "model.onnx")


@pytest.mark.parametrize("out", ["/", ".", ".."])
def test_outputs_that_hold_everything(here: Cli, tmp_path: Path, model: Path, out: str) -> None:
    for force in ([], ["--force"]):
        refused(here("compile", model, "-o", out, *FAST, *force), 2)
    nothing_left(tmp_path, "model.onnx")


def test_two_compiles_to_one_folder(here: Cli, tmp_path: Path, model: Path) -> None:
    with (tmp_path / ".build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(here("compile", model, "-o", "build", *FAST), 5, "another compile", "build")
    assert here("compile", model, "-o", "build", *FAST).code == 0
    nothing_left(tmp_path, "build", "model.onnx")


def test_two_compiles_at_once_publish_one_whole_artifact(
    tmp_path: Path, tiny: Path, environment: dict[str, str]
) -> None:
    command = [sys.executable, "-m", "onnxslim_llm", "compile", str(tiny), "-o", "build", "--verify", "off"]
    racing = [
        subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    ends = [(process, *process.communicate(timeout=120)) for process in racing]
    codes = sorted(process.returncode for process, _, _ in ends)
    assert codes[0] == 0
    for process, out, err in ends:
        if process.returncode != 0:  # it came while another one worked (5) or when the folder was there (2)
            refused(Outcome(process.returncode, out, err), process.returncode)
            assert process.returncode in (2, 5)
    whole(tmp_path / "build")
    nothing_left(tmp_path, "build")


def test_files_that_lie_where_the_work_is_done_are_not_lost(here: Cli, tmp_path: Path, model: Path) -> None:
    (tmp_path / ".build.partial").mkdir()
    (tmp_path / ".build.partial" / "thesis.txt").write_text("five years of work")
    refused(here("compile", model, "-o", "build", *FAST), 2, ".build.partial")
    assert (tmp_path / ".build.partial" / "thesis.txt").read_text() == "five years of work"


def test_a_failure_is_forgotten_after_a_success(here: Cli, tmp_path: Path, tiny: Path) -> None:
    assert here("compile", tiny, "-o", "build", *HOPELESS).code == 4
    nothing_left(tmp_path, "build.failed.json")
    assert here("compile", tiny, "-o", "build", *FAST).code == 0
    nothing_left(tmp_path, "build")


# --- disks and rights: in a mount namespace of their own, which vanishes with the process -----------------------------


def namespace() -> list[str] | None:
    """A command that runs a shell script where it may mount; None if this system does not let us."""
    for flags in (["-m"], ["-r", "-m"]):
        command = ["unshare", *flags, "sh", "-euc"]
        if shutil.which("unshare") and subprocess.run([*command, MOUNT_TEST], capture_output=True).returncode == 0:
            return command
    return None


MOUNT_TEST = "mount -t tmpfs -o size=64k tmpfs /mnt"


@pytest.fixture
def with_mounts(tmp_path: Path, environment: dict[str, str]) -> Callable[[str], Outcome]:
    """Run a shell script in `tmp_path`, with $COMPILE, in its own mount namespace."""
    command = namespace()
    if command is None:
        pytest.skip("this system lets nobody mount")

    def run(script: str) -> Outcome:
        compile_command = f"{sys.executable} -m onnxslim_llm compile"
        script = f'COMPILE="{compile_command}"\n{script}'
        done = subprocess.run([*command, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


def test_an_output_on_a_disk_that_cannot_be_written(
    with_mounts: Callable[[str], Outcome], tmp_path: Path, model: Path
) -> None:
    done = with_mounts(
        """
        mkdir disk
        mount -t tmpfs -o size=1m,ro tmpfs disk
        set +e
        $COMPILE model.onnx -o disk/build --recipe int8
        code=$?
        ls -A disk
        exit $code
        """
    )
    refused(done, 5, "disk", "-o")
    assert done.out == ""


def test_a_source_on_a_disk_that_cannot_be_written(
    with_mounts: Callable[[str], Outcome], tmp_path: Path, model: Path
) -> None:
    done = with_mounts(
        """
        mkdir disk
        mount -t tmpfs -o size=4m tmpfs disk
        mv model.onnx disk/
        mount -o remount,ro disk
        $COMPILE disk/model.onnx --recipe int8
        $COMPILE disk --recipe int8 -o build
        """
    )
    assert done.code == 0, done.err
    whole(tmp_path / "disk.slim")  # "model" says nothing: the folder names the artifact
    assert model_bytes(tmp_path / "build") == model_bytes(tmp_path / "disk.slim")


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95, 1.02], ids=lambda share: f"{share:.0%} of the model")
def test_a_disk_that_fills_up(
    with_mounts: Callable[[str], Outcome], here: Cli, tmp_path: Path, wide: Path, share: float
) -> None:
    """At the folder, in the weights or in the report: told, nothing published; with more space --resume finishes."""
    options = "--recipe int8 --verify off"
    assert here("compile", wide, "-o", "expected", *options.split()).code == 0
    size = sum(map(len, model_bytes(tmp_path / "expected").values()))
    done = with_mounts(
        f"""
        mkdir disk result
        mount -t tmpfs -o size={max(4096, int(share * size))} tmpfs disk
        set +e
        $COMPILE {wide} -o disk/build {options} 2>first.txt
        echo $? >first.code
        ls -A disk/ >first.list
        mount -o remount,size=64m disk
        set -e
        $COMPILE {wide} -o disk/build {options} --resume
        ls -A disk/ >second.list
        cp -r disk/build result/
        """
    )
    assert done.code == 0, done.err
    first = Outcome(int((tmp_path / "first.code").read_text()), "", (tmp_path / "first.txt").read_text())
    refused(first, 5, "space", "--resume")
    assert "build" not in (tmp_path / "first.list").read_text().split()
    assert (tmp_path / "second.list").read_text() == "build\n"
    whole(tmp_path / "result" / "build")
    assert model_bytes(tmp_path / "result" / "build") == model_bytes(tmp_path / "expected")


def test_the_old_artifact_survives_a_full_disk(
    with_mounts: Callable[[str], Outcome], tmp_path: Path, model: Path, old: dict[str, bytes]
) -> None:
    done = with_mounts(
        """
        mkdir disk kept
        mount -t tmpfs -o size=200k tmpfs disk
        cp -r build disk/
        set +e
        $COMPILE model.onnx -o disk/build --recipe int8 --force
        code=$?
        cp -r disk/build kept/
        exit $code
        """
    )
    refused(done, 5, "space")
    assert everything(tmp_path / "kept" / "build") == old


def test_json_of_a_failure_is_empty(here: Cli, tmp_path: Path, model: Path, old: dict[str, bytes]) -> None:
    done = here("compile", model, "-o", "build", "--json", *FAST)
    refused(done, 2)
    assert done.out == ""
    assert json.loads(old["manifest.json"])["recipe"]["name"] == "safe"
