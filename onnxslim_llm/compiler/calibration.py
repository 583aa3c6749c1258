"""Statistics as part of a compile: where the data come from, and that they are collected once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxslim_llm.compiler.progress import Progress
from onnxslim_llm.errors import SlimError, UsageError
from onnxslim_llm.ir.model import open_model
from onnxslim_llm.rewrite.passes import Pass
from onnxslim_llm.runtime.sidefiles import SideFiles
from onnxslim_llm.runtime.tokenizer import load_tokenizer
from onnxslim_llm.stats.calibration import Calibration, TensorCalibration, TokenCalibration

if TYPE_CHECKING:
    from onnxslim_llm.runtime.decoder import DecoderRunner
    from onnxslim_llm.runtime.session import Session
    from onnxslim_llm.stats.statistics import Statistics

__all__ = ["SELF", "Calibrator", "written_by"]

#: Instead of a file: text that the model itself writes.
SELF = "self"

#: Tokens that statistics are collected on: enough for inputs of some thousands of channels.
TOKENS = 32_768
#: Tokens of a sample, if the model's context is not shorter.
WINDOW = 512
#: The model writes fewer, and shorter ones: every token of a row costs a step, which writes one for many rows at once.
#: Samples of 128 tokens serve as well as those of 512 (mean KL 0.0263 and 0.0262 for 4.5 bits of the sample model).
SELF_TOKENS = 16_384
_SELF_ROWS, _FEWEST_ROWS, _SELF_WINDOW = 128, 32, 128
#: From this size of the weights on, a step takes a second or so: then fewer tokens.
_LARGE_BYTES, _LARGE_TOKENS = 1 << 30, 4096

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
    """

    source: Path
    data: Path | None
    folder: Path
    threads: int
    progress: Progress
    notes: list[str] = field(default_factory=list)
    _statistics: Statistics | None = field(default=None, repr=False)
    _data: Calibration | None = field(default=None, repr=False)
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
            identity = f"{self.source} {self.source.stat().st_size} {self.source.stat().st_mtime_ns}"
            self._statistics, notes = collect(
                self.source,
                hashlib.sha256(identity.encode()).hexdigest(),
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
        if steps and self.data is None and all(step.takes_own_text for step in steps):
            return self._of_own_text(steps)
        statistics = self.statistics() if steps else None
        if statistics is None or statistics.gains or not any(step.wants_gains for step in steps):
            return statistics
        from onnxslim_llm.stats.gains import measure_gains

        assert self._data is not None
        self.progress.stage("calibrate: gains", None, "weights")
        gains = measure_gains(
            self.source,
            self._data,
            statistics,
            threads=self.threads,
            progress=lambda done, total: self.progress.advance(done),
        )
        self._statistics = replace(statistics, gains=gains)
        return self._statistics

    def _of_own_text(self, steps: list[Pass]) -> Statistics | None:
        """Return statistics of text that the model writes; None, with a note, for what does not run or decode."""
        try:
            self.data = Path(SELF)
            return self.wanted_by(steps)
        except SlimError as error:
            self.notes.append(f"the model could not write a text to learn from ({error.what}): weights are searched")
            return None
        finally:
            self.data = None

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

    def tokens(self, limit: int | None = TOKENS) -> np.ndarray[tuple[int], np.dtype[np.int64]] | None:
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

    def array_input(self, name: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
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
            large = _model_bytes(self.source) > _LARGE_BYTES
            window, total = min(window, _SELF_WINDOW), _LARGE_TOKENS if large else SELF_TOKENS
            told = self._written(runner, window, total)
            return TokenCalibration.checked(told, window, runner.vocab, runner.arrays)
        calibration = TokenCalibration.checked(self._read(files)[:TOKENS], window, runner.vocab, runner.arrays)
        self._look_at(calibration, runner)
        return calibration

    def _written(self, runner: DecoderRunner, window: int, total: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Return what the model writes; an interrupted compile that goes on finds it in its folder."""
        file = self.folder / "written.npy"
        if file.is_file():
            found: np.ndarray[tuple[int], np.dtype[np.int64]] = np.load(file)
            return found
        self.progress.stage("calibrate: the model writes", None, "tokens")
        written = written_by(runner, window, total, lambda done, of: self.progress.advance(done, f"{done} of {of}"))
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".part.npy")
        np.save(temporary, written)
        os.replace(temporary, file)
        return written

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

    def _read(self, files: list[Path], limit: int | None = TOKENS) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
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


def _model_bytes(source: Path) -> int:
    """Bytes of the weights of a source model."""
    return open_model(source).weight_bytes()


def written_by(
    runner: DecoderRunner, window: int, total: int = SELF_TOKENS, progress: Callable[[int, int], None] | None = None
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return token ids sampled from the model itself, many rows at once, each from a random first token.

    Args:
        runner: The model.
        window: Tokens of a row.
        total: How many tokens to write; the rows of a batch are always finished.
        progress: Called with (done, of how many) tokens.
    """
    rng = np.random.default_rng(0)
    fixed = runner.signature.batch
    rows = fixed or min(_SELF_ROWS, max(_FEWEST_ROWS, total // window))
    written = []
    batches = max(1, total // (rows * window))
    for batch in range(batches):
        ids = rng.integers(0, runner.vocab, (rows, 1))
        logits, state = runner.extend(ids)
        for _ in range(window - 1):
            last = logits[:, -1].astype(np.float64)
            # The largest of logits with Gumbel noise is a sample of their softmax.
            chosen = np.argmax(last + rng.gumbel(size=last.shape), axis=-1)[:, None]
            ids = np.concatenate([ids, chosen], axis=1)
            logits, state = runner.extend(chosen, state)
            if progress:
                progress((batch * window + ids.shape[1]) * rows, batches * window * rows)
        written.append(ids)
    return np.concatenate(written).reshape(-1).astype(np.int64)
