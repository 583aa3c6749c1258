"""The split of the standard library keeps held-out text out of training."""

from __future__ import annotations

from pathlib import Path

import pytest

# Read from the checkout: conftest.py puts its root on the path.
from models import corpus


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A tiny standard library with every named module."""
    for name in (*corpus.HELD_OUT, *corpus.HELD_OUT_COMPANIONS, *corpus.CALIBRATION, "test/test_heapq.py", "os.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"name = {name!r}\n", encoding="utf-8")
    return tmp_path


def test_split_is_by_name(library: Path) -> None:
    found = corpus.collect(library)
    train = {doc.path for doc in found.train}
    assert "os.py" in train
    assert set(corpus.CALIBRATION) <= train
    assert train.isdisjoint(corpus.HELD_OUT)
    assert train.isdisjoint(corpus.HELD_OUT_COMPANIONS)
    assert "test/test_heapq.py" not in train
    assert tuple(doc.path for doc in found.held_out) == corpus.HELD_OUT


def test_skips_what_is_not_a_program(library: Path) -> None:
    (library / "broken.py").write_text("def f(:\n", encoding="utf-8")
    (library / "latin.py").write_bytes(b"# caf\xe9\n")
    (library / "table.py").write_text(f"x = {list(range(500))}\n", encoding="utf-8")
    (library / "encodings").mkdir()
    (library / "encodings" / "cp037.py").write_text("table = 'abc'\n", encoding="utf-8")
    (library / "site-packages").mkdir()
    (library / "site-packages" / "other.py").write_text("x = 'not ours'\n", encoding="utf-8")
    paths = {doc.path for doc in corpus.collect(library).train}
    assert paths.isdisjoint({"broken.py", "latin.py", "table.py", "encodings/cp037.py", "site-packages/other.py"})


def test_long_file_is_cut_at_a_line_end(library: Path) -> None:
    (library / "long.py").write_text("value = 'text'\n" * 20_000, encoding="utf-8")
    text = next(doc.text for doc in corpus.collect(library).train if doc.path == "long.py")
    assert corpus.MAX_FILE_BYTES - 15 <= len(text) <= corpus.MAX_FILE_BYTES
    assert text.endswith("'text'\n")


def test_missing_module_is_named(library: Path) -> None:
    (library / "heapq.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"heapq\.py"):
        corpus.collect(library)


def test_order_and_fingerprint_are_repeatable(library: Path) -> None:
    first, second = corpus.collect(library), corpus.collect(library)
    assert first == second
    (library / "os.py").write_text("changed = 'yes'\n", encoding="utf-8")
    assert corpus.collect(library).fingerprint() != first.fingerprint()


@pytest.mark.slow
def test_this_interpreters_library_has_no_held_out_text_in_training() -> None:
    try:
        found = corpus.collect()
    except FileNotFoundError as error:
        pytest.skip(f"this Python's library is not complete: {error}")
    seen = {doc.text for doc in found.train}
    assert not any(doc.text in seen for doc in found.held_out)
    assert len(found.train) > 300
