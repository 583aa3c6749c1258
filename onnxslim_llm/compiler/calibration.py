"""Statistics as part of a compile: where the data come from, and that they are collected once."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxslim_llm.compiler.own_text import OWN_WINDOW, Tokens, own_text, token_count
from onnxslim_llm.compiler.probing_cost import too_much_work
from onnxslim_llm.compiler.progress import Progress
from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.ir.model import open_model
from onnxslim_llm.rewrite.passes import Pass
from onnxslim_llm.runtime.sidefiles import SideFiles
from onnxslim_llm.runtime.tokenizer import load_tokenizer
from onnxslim_llm.stats.calibration import Calibration, TensorCalibration, TokenCalibration

if TYPE_CHECKING:
    from onnxslim_llm.runtime.decoder import DecoderRunner
    from onnxslim_llm.runtime.session import Session
    from onnxslim_llm.stats.statistics import Statistics

__all__ = ["SELF", "Calibrator"]

#: Instead of a file: text that the model itself writes.
SELF = "self"

#: Tokens that statistics are collected on: enough for inputs of some thousands of channels.
TOKENS = 32_768
#: Tokens of a sample, if the model's context is not shorter.
WINDOW = 512

_ARRAYS = (".npz", ".npy")


@dataclass
class Calibrator:
    """Collects statistics of a source model when a pass first asks for them.

    Attributes:
        source: The .onnx file.
        data: --calib: a file or folder, `SELF`, or None.
        folder: Where statistics lie while the compile needs them.
        threads: Of the runtime.
        progress: Told about the runs.
        notes: What the user should know.
        any_size: Knows the source before its sizes were fixed, where they were and the user gave no data: models write
            text one token at a time.
    """

    source: Path
    data: Path | None
    folder: Path
    threads: int
    progress: Progress
    notes: list[str] = field(default_factory=list)
    any_size: Calibrator | None = None
    _statistics: Statistics | None = field(default=None, repr=False)
    _data: Calibration | None = field(default=None, repr=False)
    _no_own_text: str = field(default="", repr=False)
    _ranges: dict[str, NDArray[Any]] | None = field(default=None, repr=False)

    def statistics(self) -> Statistics | None:
        """Return the statistics; None if there are no data.

        Raises:
            UsageError: The data do not fit the model.
            ModelError: The model does not run on them.
        """
        if self._statistics is None and self.data is not None:
            from onnxslim_llm.runtime.session import open_session
            from onnxslim_llm.stats.collect import collect

            self.progress.stage("calibrate", None, "samples")
            calibration = self._data = self.calibration(open_session(self.source, threads=self.threads))
            self.progress.stage("calibrate: statistics", None, "samples")
            self._statistics, notes = collect(
                self.source,
                self._identity(),
                calibration,
                self.folder,
                threads=self.threads,
                progress=lambda done, total: self.progress.advance(done, f"{done} of {total}"),
            )
            self.notes += notes
        return self._statistics

    def wanted_by(self, passes: Iterable[Pass]) -> Statistics | None:
        """Return the statistics if one of the passes works from them, with gains if one wants these."""
        steps = [step for step in passes if step.wants_statistics]
        if not steps:
            return None
        if (self.data is None or self.any_size is not None) and all(step.takes_own_text for step in steps):
            free = self.any_size or self
            found = free._of_own_text(steps)
            self.notes += [note for note in free.notes if note not in self.notes]
            return found
        return self._with_gains(self.statistics(), steps)

    def _with_gains(self, statistics: Statistics | None, steps: Sequence[Pass]) -> Statistics | None:
        if statistics is None or statistics.gains or not any(step.wants_tied_gains for step in steps):
            return statistics
        from onnxslim_llm.stats.gains import measure_gains

        assert self._data is not None
        self.progress.stage("calibrate: gains", None, "weights")
        gains = measure_gains(
            self.source,
            self._data,
            statistics,
            only_tied=not any(step.wants_gains for step in steps),
            threads=self.threads,
            progress=lambda done, total: self.progress.advance(done),
        )
        self._statistics = replace(statistics, gains=gains)
        return self._statistics

    def _of_own_text(self, steps: Sequence[Pass]) -> Statistics | None:
        """Return statistics of text that the model writes; None, with a note, for what does not run or decode."""
        if self._no_own_text:
            return None
        if all(step.minds_cost for step in steps):
            self._no_own_text = too_much_work(self.stub(), token_count(self.source))
        if not self._no_own_text:
            try:
                self.data = Path(SELF)
                found = self._with_gains(self.statistics(), steps)
                if self._data is not None and found is not None and found.taps:
                    self._tell_own_text(len(self._data.tokens) if isinstance(self._data, TokenCalibration) else 0)
                    return found
                self._no_own_text = "no product with weights was found to listen to"
            except (ModelError, UsageError) as error:
                what = f"{error.what}, {error.where}" if error.where not in ("", "--calib") else error.what
                self._no_own_text = (
                    f"the model could not write a text to learn from: {what}; give data with --calib FILE"
                )
            finally:
                self.data = None
        self.notes.append(f"weights are chosen without statistics: {self._no_own_text}")
        return None

    def _tell_own_text(self, tokens: int) -> None:
        what = f"weights are fitted to text that the model wrote itself ({tokens} tokens)"
        note = f"{what}: --calib FILE with text like what it will read gives better weights"
        self.notes += [] if note in self.notes else [note]

    def cache_ranges_wanted_by(self, passes: Iterable[Pass]) -> dict[str, NDArray[Any]] | None:
        """Return how large the caches' entries become, if one of the passes wants to know.

        Raises:
            UsageError: The model has no cache that grows.
            ModelError: It does not run.
        """
        if not any(step.wants_cache_ranges for step in passes):
            return None
        if self._ranges is None:
            from onnxslim_llm.compiler.cache_ranges import cache_ranges  # loads the runtime

            files = [] if self.data is None or str(self.data) == SELF else self._files()
            text = None if not files or any(file.suffix in _ARRAYS for file in files) else self._read(files).tolist()
            if text is None:
                self.notes.append("the scales of the int8 KV cache come from random tokens; --calib TEXT is better")
            self._ranges = cache_ranges(self.source, self.threads, text)
        return self._ranges

    def discard(self) -> None:
        """Remove what was stored: the weights are written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def tokens(self, limit: int | None = TOKENS) -> Tokens | None:
        """Return the tokens of the user's text; None if there is none.

        Args:
            limit: Read no more files or lines once there are so many; None: read everything.

        Raises:
            UsageError: It cannot be read.
        """
        if self.data is None or str(self.data) == SELF or not self.data.exists():
            return None
        files = self._files()
        return None if any(file.suffix in _ARRAYS for file in files) else self._read(files, limit)

    def array_input(self, name: str) -> Tokens:
        """Return all values of one input in the user's .npz files, flat.

        Raises:
            UsageError: They cannot be read, or a file lacks the input.
        """
        found = [np.zeros(0, np.int64)]
        for file in (f for f in self._files() if f.suffix in _ARRAYS):
            try:
                stored = np.load(file)
                values = stored[name] if file.suffix == ".npz" else stored
            except (OSError, ValueError, KeyError) as error:
                raise UsageError(f"the input '{name}' cannot be read: {error}", where=str(file)) from error
            found.append(np.asarray(values, np.int64).reshape(-1))
        return np.concatenate(found)

    def stub(self) -> onnx.ModelProto:
        """Return the source without its weights."""
        return open_model(self.source).to_proto("omit")

    def calibration(self, session: Session) -> Calibration:
        """Return the data that the user gave; they must have given some.

        Args:
            session: The open source model.

        Raises:
            UsageError: They do not fit the model.
        """
        from onnxslim_llm.runtime.decoder import DecoderRunner
        from onnxslim_llm.runtime.signature import find_decoder
        from onnxslim_llm.verify.arrays import load_arrays

        assert self.data is not None
        signature, why = find_decoder(session)
        itself = str(self.data) == SELF
        if not itself and not self.data.exists():
            todo = "check the path after --calib"
            raise UsageError("there is no such calibration file", where=str(self.data), todo=todo)
        files = [] if itself else self._files()
        if any(file.suffix in _ARRAYS for file in files):
            return TensorCalibration(tuple(case.feeds for case in load_arrays(self.data, session.inputs)))
        if signature is None:
            what = f"text cannot be fed to this model: {why}"
            raise UsageError(what, where="--calib", todo="give .npz files with one array per input name")
        runner = DecoderRunner(session, signature)
        context = SideFiles.of(self.source.parent).context_length
        window = min(WINDOW, signature.length or WINDOW, context or WINDOW)
        if itself:
            window = min(window, OWN_WINDOW)
            told = self._written(runner, window)
            return TokenCalibration.checked(told, window, runner.vocab, runner.arrays)
        calibration = TokenCalibration.checked(self._read(files)[:TOKENS], window, runner.vocab, runner.arrays)
        self._look_at(calibration, runner)
        return calibration

    def _written(self, runner: DecoderRunner, window: int) -> Tokens:
        file = self.folder / f"written-{self._identity()[:16]}.npy"
        if not file.is_file():
            self.progress.stage("calibrate: the model writes", None, "tokens")
        return own_text(
            runner,
            window,
            token_count(self.source),
            file,
            lambda done, of: self.progress.advance(done, f"{done} of {of}"),
        )

    def _identity(self) -> str:
        """Return a digest of the source's file: statistics may be kept for further compiles."""
        state = self.source.stat()
        return hashlib.sha256(f"{self.source} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()

    def _look_at(self, calibration: TokenCalibration, runner: DecoderRunner) -> None:
        """Note what is odd about a text."""
        from onnxslim_llm.stats.surprise import measure_surprise

        found = measure_surprise(runner, calibration.tokens, calibration.window)
        if found is not None and found.foreign:
            self.notes.append(
                f"the calibration text is not what the model knows: its loss is {found.loss:.1f} nats a token where "
                f"the model expects {found.entropy:.1f}; another language, or the wrong tokenizer? Weights fitted to "
                "it may be worse on other text"
            )

    def _files(self) -> list[Path]:
        assert self.data is not None
        return sorted(self.data.iterdir()) if self.data.is_dir() else [self.data]

    def _read(self, files: list[Path], limit: int | None = TOKENS) -> Tokens:
        tokenizer = None
        found: list[int] = []
        for file in (f for f in files if f.suffix in (".txt", ".jsonl") or len(files) == 1):
            for piece in _pieces(file):
                if isinstance(piece, str):
                    tokenizer = tokenizer or load_tokenizer(self.source.parent)
                    piece = tokenizer.encode(piece)
                found += piece
                if limit is not None and len(found) >= limit:
                    break
        return np.asarray(found, np.int64)


def _pieces(file: Path) -> Iterator[str | list[int]]:
    """Yield the texts or token ids of a text or .jsonl file.

    Raises:
        UsageError: It is neither.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the calibration text cannot be read: {error}", where=str(file)) from error
    if file.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UsageError(f"line {number} is no JSON: {error}", where=str(file)) from error
        found = entry.get("tokens", entry.get("text")) if isinstance(entry, dict) else entry
        if isinstance(found, str) or (isinstance(found, list) and all(isinstance(i, int) for i in found)):
            yield found
        else:
            todo = 'write {"text": "..."} or {"tokens": [1, 2, ...]} on each line'
            raise UsageError(f"line {number} has neither text nor tokens", where=str(file), todo=todo)
