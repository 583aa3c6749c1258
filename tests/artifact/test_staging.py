"""The output folder appears complete or not at all, and nothing of the user's is ever removed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from onnxslim_llm.artifact import staging as staging_module
from onnxslim_llm.artifact.manifest import Manifest, read_manifest
from onnxslim_llm.artifact.staging import Staging
from onnxslim_llm.errors import CompilerBug, GateError, ModelError, ResourceError, UsageError

Fill = Callable[[Path, int], Manifest]

_NOBODY = 65534  # the user without rights, by convention


def publish(out: Path, fill: Fill, version: int, *, force: bool = False) -> Staging:
    with Staging(out, force=force) as staging:
        staging.begin(f"work {version}")
        fill(staging.directory, version)
        staging.publish()
    return staging


def fail(out: Path, fill: Fill, error: BaseException) -> None:
    """A compile that ends with `error` after its first layer."""
    with Staging(out) as staging:
        staging.begin("work")
        fill(staging.directory, 1)
        staging.journal.mark("layer 0")
        raise error


def version_of(out: Path) -> int:
    return int(read_manifest(out).recipe["version"])


def test_publishes_into_a_new_place_with_parents_and_leaves_nothing_else(tmp_path: Path, fill: Fill) -> None:
    publish(tmp_path / "a" / "b" / "out", fill, 1)
    assert version_of(tmp_path / "a" / "b" / "out") == 1
    assert os.listdir(tmp_path / "a" / "b") == ["out"]
    assert sorted(os.listdir(tmp_path / "a" / "b" / "out")) == ["manifest.json", "model.onnx", "model.onnx.data"]


def test_an_existing_folder_is_refused_before_any_work(tmp_path: Path, fill: Fill) -> None:
    publish(tmp_path / "out", fill, 1)
    with pytest.raises(UsageError, match="exists") as caught, Staging(tmp_path / "out"):
        pytest.fail("the body must not run")
    assert "--force" in caught.value.todo
    assert version_of(tmp_path / "out") == 1
    assert os.listdir(tmp_path) == ["out"]


def test_force_replaces_an_artifact_or_an_empty_folder(tmp_path: Path, fill: Fill) -> None:
    (tmp_path / "out").mkdir()
    publish(tmp_path / "out", fill, 1, force=True)
    publish(tmp_path / "out", fill, 2, force=True)
    assert version_of(tmp_path / "out") == 2
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("with_artifact", [False, True])
def test_force_never_removes_files_of_the_user(tmp_path: Path, fill: Fill, with_artifact: bool) -> None:
    out = tmp_path / "out"
    if with_artifact:
        publish(out, fill, 1)
    (out / "photos").mkdir(parents=True)
    (out / "photos" / "cat.jpg").write_text("meow")
    with pytest.raises(UsageError, match=r"photos/cat\.jpg"), Staging(out, force=True):
        pytest.fail("the body must not run")
    assert (out / "photos" / "cat.jpg").read_text() == "meow"


def test_a_manifest_of_another_program_protects_its_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text('{"name": "web app", "icons": []}')
    with pytest.raises(UsageError, match=r"manifest\.json"), Staging(tmp_path / "out", force=True):
        pytest.fail("the body must not run")


def test_a_working_folder_name_that_is_taken_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "thesis.tex").write_text("years")
    with pytest.raises(UsageError, match="taken by other files"), Staging(tmp_path / "out") as staging:
        staging.begin("work")
    assert (tmp_path / ".out.partial" / "thesis.tex").read_text() == "years"


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("text")
    with pytest.raises(UsageError, match="is a file"), Staging(tmp_path / "out", force=True):
        pytest.fail("the body must not run")


def test_force_does_not_remove_the_source(tmp_path: Path, fill: Fill) -> None:
    publish(tmp_path / "out", fill, 1)
    source = tmp_path / "out" / "model.onnx"
    with pytest.raises(UsageError, match="holds the model"), Staging(tmp_path / "out", source=source, force=True):
        pytest.fail("the body must not run")
    assert source.exists()


@pytest.mark.parametrize("error", [ModelError("bad weights"), GateError("cosine"), ValueError("bug")])
def test_an_error_removes_what_was_built(tmp_path: Path, fill: Fill, error: Exception) -> None:
    with pytest.raises(type(error)):
        fail(tmp_path / "deep" / "out", fill, error)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left"), MemoryError()])
def test_an_interruption_keeps_the_work_for_resume(tmp_path: Path, fill: Fill, error: BaseException) -> None:
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ResourceError
    with pytest.raises(expected) as caught:
        fail(tmp_path / "out", fill, error)
    if isinstance(caught.value, ResourceError):
        assert "--resume" in caught.value.todo
    assert os.listdir(tmp_path) == [".out.partial"]
    with Staging(tmp_path / "out") as staging:
        staging.begin("work", resume=True)
        assert staging.journal.resumed
        assert staging.journal.done("layer 0")
        assert (staging.directory / "model.onnx").exists()
        staging.publish()
    assert version_of(tmp_path / "out") == 1


@pytest.mark.parametrize(("identity", "resume", "note"), [("other", True, "starting over"), ("work", False, "")])
def test_stale_or_unwanted_work_is_discarded(
    tmp_path: Path, fill: Fill, identity: str, resume: bool, note: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "out", fill, KeyboardInterrupt())
    with Staging(tmp_path / "out") as staging:
        staging.begin(identity, resume=resume)
        assert not staging.journal.done("layer 0")
        assert os.listdir(staging.directory) == [".journal"]
        assert note in "".join(staging.notes)


def test_resume_without_a_partial_folder_starts_and_says_so(tmp_path: Path) -> None:
    with Staging(tmp_path / "out") as staging:
        staging.begin("work", resume=True)
        assert "nothing to resume" in staging.notes[0]


def test_two_compiles_of_one_folder_do_not_meet(tmp_path: Path, fill: Fill) -> None:
    code = (
        "import sys; from pathlib import Path; from onnxslim_llm.artifact.staging import Staging\n"
        "with Staging(Path(sys.argv[1])) as s:\n    s.begin('w'); print('ready', flush=True); sys.stdin.read()"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(ResourceError, match="another compile"), Staging(tmp_path / "out"):
            pytest.fail("the body must not run")
        other.kill()
    publish(tmp_path / "out", fill, 1)  # the kernel dropped the dead process's lock
    assert version_of(tmp_path / "out") == 1


def test_a_failed_gate_leaves_its_figures_beside_and_the_old_artifact_in_place(tmp_path: Path, fill: Fill) -> None:
    publish(tmp_path / "out", fill, 1)

    def rejected_compile() -> None:
        with Staging(tmp_path / "out", force=True) as staging:
            staging.begin("work")
            staging.reject(fill(staging.directory, 2))
            raise GateError("cosine 0.5 is below 0.99")

    with pytest.raises(GateError):
        rejected_compile()
    path = tmp_path / "out.failed.json"
    assert read_manifest(path).failed_gates[0].value == 0.5
    assert version_of(tmp_path / "out") == 1
    assert sorted(os.listdir(tmp_path)) == ["out", "out.failed.json"]
    publish(tmp_path / "out", fill, 3, force=True)
    assert os.listdir(tmp_path) == ["out"]


def test_nothing_without_a_manifest_is_published(tmp_path: Path) -> None:
    with pytest.raises(CompilerBug):
        publish(tmp_path / "out", lambda folder, version: None, 1)  # type: ignore[arg-type, return-value]
    assert os.listdir(tmp_path) == []


def test_a_parent_that_is_a_file_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError) as caught, Staging(tmp_path / "file" / "out"):
        pytest.fail("the body must not run")
    assert "-o" in caught.value.todo


def as_an_ordinary_user(action: Callable[[], None]) -> int:
    """Run `action` in a child that is not root, whom no permission stops; 0 if it returned."""
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setresuid(_NOBODY, _NOBODY, _NOBODY)
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["not writable", "not even readable"])
def test_a_closed_parent_is_a_resource_error(mode: int) -> None:
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which belongs to this user alone
        os.chmod(folder, mode)

        def refused() -> None:
            with pytest.raises(ResourceError, match="permission denied") as caught, Staging(Path(folder) / "out"):
                pytest.fail("the body must not run")
            assert "-o" in caught.value.todo

        assert as_an_ordinary_user(refused) == 0
        os.chmod(folder, 0o700)
        assert os.listdir(folder) == []


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path, fill: Fill) -> None:
    (tmp_path / "disk").mkdir()
    publish(tmp_path / "disk" / "real", fill, 1)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    publish(tmp_path / "out", fill, 2, force=True)
    assert (tmp_path / "out").is_symlink()
    assert version_of(tmp_path / "disk" / "real") == 2


def test_without_an_atomic_swap_two_renames_do(tmp_path: Path, fill: Fill, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "out", fill, 1)
    monkeypatch.setattr(staging_module, "exchange", lambda first, second: False)
    publish(tmp_path / "out", fill, 2, force=True)
    assert version_of(tmp_path / "out") == 2
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_size_limit_is_a_resource_error(tmp_path: Path) -> None:
    """A real refusal of the kernel in the midst of writing, as a full disk is."""
    code = (
        "import resource, sys; from pathlib import Path; from onnxslim_llm.artifact.staging import Staging\n"
        "from onnxslim_llm.errors import ResourceError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    with Staging(Path(sys.argv[1])) as s:\n"
        "        s.begin('w'); (s.directory / 'model.onnx.data').write_bytes(bytes(1_000_000))\n"
        "except ResourceError as error:\n"
        "    print(error); sys.exit(error.exit_code)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
    assert run.returncode == 5, run.stderr
    assert "file too large" in run.stdout
    assert "ulimit -f" in run.stdout
    assert os.listdir(tmp_path) == [".out.partial"]
