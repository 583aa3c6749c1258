"""The journal believes only whole lines of the same work since the same boot."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from onnxslim_llm.artifact import journal as journal_module
from onnxslim_llm.artifact.journal import Journal, compile_identity, is_journal


def test_resumes_marks_of_the_same_identity(tmp_path: Path) -> None:
    first = Journal(tmp_path / "j", "work")
    assert not first.resumed
    first.mark("layer 0 \n tricky \u00e9")
    first.mark("layer 1")
    first.close()
    second = Journal(tmp_path / "j", "work", resume=True)
    assert second.resumed
    assert second.done("layer 0 \n tricky \u00e9")
    assert second.done("layer 1")
    assert not second.done("layer 2")
    second.mark("layer 2")
    second.close()
    assert Journal(tmp_path / "j", "work", resume=True).done("layer 2")


def test_figures_come_back_exactly(tmp_path: Path) -> None:
    figures = {"sq_error": 1 / 3, "bits": 4, "weights": ["a", "b"], "nonfinite": float("inf")}
    first = Journal(tmp_path / "j", "work")
    first.note("layer", figures)
    first.mark("layer")
    first.close()
    second = Journal(tmp_path / "j", "work", resume=True)
    assert second.detail("layer") == first.detail("layer") == figures
    assert second.detail("other") is None
    assert len(second) == 1


@pytest.mark.parametrize(("identity", "resume"), [("other work", True), ("work", False)])
def test_starts_empty_for_other_work_or_without_resume(tmp_path: Path, identity: str, resume: bool) -> None:
    first = Journal(tmp_path / "j", "work")
    first.mark("a")
    first.close()
    second = Journal(tmp_path / "j", identity, resume=resume)
    assert not second.resumed
    assert not second.done("a")
    second.close()
    assert not Journal(tmp_path / "j", identity, resume=True).done("a")


def test_cuts_a_torn_line_off_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "j"
    first = Journal(path, "work")
    header = path.stat().st_size
    first.mark("a")
    one = path.stat().st_size
    first.mark("b")
    first.close()
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        torn = Journal(path, "work", resume=True)
        assert torn.resumed == (length >= header)
        assert torn.done("a") == (length >= one)
        assert not torn.done("b")
        torn.mark("c")
        torn.close()
        assert Journal(path, "work", resume=True).done("c")


def test_a_journal_from_before_a_reboot_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Journal(tmp_path / "j", "work")
    first.mark("a")
    first.close()
    monkeypatch.setattr(journal_module, "_boot_id", lambda: "another boot")
    assert not Journal(tmp_path / "j", "work", resume=True).resumed


def test_marks_from_many_threads_are_all_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", "work")
    keys = [[f"{t}:{i}" for i in range(50)] for t in range(4)]
    threads = [threading.Thread(target=lambda part=part: [journal.mark(key) for key in part]) for part in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    again = Journal(tmp_path / "j", "work", resume=True)
    assert len(again) == 200
    assert all(again.done(key) for part in keys for key in part)


def test_identity_follows_content_data_files_and_options(tmp_path: Path) -> None:
    model, data = tmp_path / "m.onnx", tmp_path / "m.data"
    model.write_bytes(b"graph")
    data.write_bytes(b"weights")
    base = compile_identity(model, [data], {"target": "portable", "bits": 4})
    assert base == compile_identity(model, [data], {"bits": 4, "target": "portable"})
    assert base != compile_identity(model, [data], {"target": "portable", "bits": 8})
    assert base != compile_identity(model, [], {"target": "portable", "bits": 4})
    os.utime(data, ns=(1, 1))
    changed = compile_identity(model, [data], {"target": "portable", "bits": 4})
    assert base != changed
    model.write_bytes(b"grapH")
    assert changed != compile_identity(model, [data], {"target": "portable", "bits": 4})


def test_tells_a_journal_from_other_files(tmp_path: Path) -> None:
    Journal(tmp_path / "j", "work").close()
    (tmp_path / "text").write_text("{}\n")
    (tmp_path / "binary").write_bytes(b"\xff\x00")
    assert is_journal(tmp_path / "j")
    assert not is_journal(tmp_path / "text")
    assert not is_journal(tmp_path / "binary")
    assert not is_journal(tmp_path / "missing")
