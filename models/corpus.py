"""Collect the Python standard library's own source text and split it into train, held-out and calibration parts.

The text is read from the running interpreter's standard library, so every machine with Python has it
(Python Software Foundation License). The split is by module name: nothing is drawn at random.

    python -m models.corpus -o models/stdlib-llama     # writes heldout.txt and calib.txt
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import platform
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

# Never trained on; heldout.txt is these modules in this order.
HELD_OUT = (
    "textwrap.py", "heapq.py", "sched.py", "fractions.py", "queue.py", "graphlib.py", "calendar.py", "getopt.py",
    "asyncio/locks.py", "tempfile.py", "cmd.py", "html/parser.py", "shelve.py", "glob.py", "fileinput.py",
    "json/decoder.py",
)  # fmt: skip
# Their unit tests quote them, so these are left out of training too (besides test/test_<module>.py).
HELD_OUT_COMPANIONS = ("test/test_asyncio/test_locks.py", "test/test_json/test_decode.py", "test/test_htmlparser.py")
# Trained on; calib.txt is these modules. Calibration must never see the held-out text.
CALIBRATION = (
    "csv.py", "contextlib.py", "random.py", "string.py", "shlex.py", "copy.py", "linecache.py", "bisect.py",
    "gzip.py", "http/cookies.py",
)  # fmt: skip

SKIPPED_FOLDERS = ("site-packages", "pydoc_data", "__pycache__", "lib2to3/tests/data")
ENCODINGS_KEPT = ("__init__", "aliases", "idna", "punycode", "utf_8", "utf_8_sig", "utf_16", "utf_32", "hex_codec")
MAX_FILE_BYTES = 131_072  # longer files are cut at a line end, so that no single file dominates
MAX_DIGIT_SHARE = 0.15  # above this a file is a table of numbers, not a program


@dataclass(frozen=True)
class Document:
    """One source file: its path relative to the standard library (with ``/``) and its text."""

    path: str
    text: str

    @property
    def is_test(self) -> bool:
        """Whether the file belongs to the standard library's own test suite."""
        return self.path.startswith("test/") or "/test/" in self.path or "/tests/" in self.path


@dataclass(frozen=True)
class Corpus:
    """The three parts of the text; ``train`` contains the calibration modules, never the held-out ones."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    calibration: tuple[Document, ...]

    def fingerprint(self) -> str:
        """SHA-256 over the training documents, to say in a log exactly which text was used."""
        digest = hashlib.sha256()
        for doc in self.train:
            digest.update(doc.path.encode() + b"\0" + doc.text.encode() + b"\0")
        return digest.hexdigest()


def stdlib_root() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def _read(path: Path) -> str | None:
    """Text of a source file, or None when it is not valid UTF-8 Python or mostly numbers."""
    try:
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the test suite holds deliberately odd escapes
            ast.parse(text)
    except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not text.strip() or sum(c.isdigit() for c in text) > MAX_DIGIT_SHARE * len(text):
        return None
    if len(text) > MAX_FILE_BYTES:
        text = text[: text.rindex("\n", 0, MAX_FILE_BYTES) + 1]
    return text


def _wanted(rel: str) -> bool:
    if any(f"/{rel}".startswith(f"/{d}/") or f"/{d}/" in f"/{rel}" for d in SKIPPED_FOLDERS):
        return False
    if rel.startswith("encodings/"):
        return Path(rel).stem in ENCODINGS_KEPT
    return not rel.startswith("_sysconfigdata")


def collect(root: Path | None = None) -> Corpus:
    """Read the standard library under ``root`` (default: the running interpreter's) and split it.

    Raises:
        FileNotFoundError: a held-out or calibration module is missing.
    """
    root = root or stdlib_root()
    by_path: dict[str, Document] = {}
    for path in sorted(root.rglob("*.py")):
        rel = path.relative_to(root).as_posix()
        if _wanted(rel) and (text := _read(path)) is not None:
            by_path[rel] = Document(rel, text)
    if missing := [name for name in HELD_OUT + CALIBRATION if name not in by_path]:
        raise FileNotFoundError(f"standard library at {root} lacks {', '.join(missing)}")
    hidden = {*HELD_OUT, *HELD_OUT_COMPANIONS, *(f"test/test_{Path(name).stem}.py" for name in HELD_OUT)}
    return Corpus(
        train=tuple(doc for rel, doc in by_path.items() if rel not in hidden),
        held_out=tuple(by_path[name] for name in HELD_OUT),
        calibration=tuple(by_path[name] for name in CALIBRATION),
    )


def joined(docs: tuple[Document, ...]) -> str:
    """One readable text: each document under a comment line that names it and its licence."""
    source = f"CPython {platform.python_version()}, Python Software Foundation License"
    return "\n".join(f"# ---- Lib/{doc.path} ({source}) ----\n{doc.text}" for doc in docs)


def main() -> None:
    """Write heldout.txt and calib.txt."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("-o", "--out", type=Path, default=Path("models/stdlib-llama"))
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    corpus = collect()
    for name, docs in (("heldout.txt", corpus.held_out), ("calib.txt", corpus.calibration)):
        (out / name).write_text(joined(docs), encoding="utf-8", newline="\n")
        print(f"{out / name}: {(out / name).stat().st_size} bytes, {len(docs)} modules")
    tests = sum(len(d.text) for d in corpus.train if d.is_test)
    total = sum(len(d.text) for d in corpus.train)
    print(f"train: {len(corpus.train)} files, {total} characters, {tests} of them tests; {corpus.fingerprint()}")


if __name__ == "__main__":
    main()
