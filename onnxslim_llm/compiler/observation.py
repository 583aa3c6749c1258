"""Inputs for graphs between two passes: the user's data, or made-up ones, fitted to the graph's own signature."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.compiler.calibration import SELF, Calibrator
from onnxslim_llm.errors import UsageError
from onnxslim_llm.gradients.scorer import GradientScorer
from onnxslim_llm.gradients.tuner import LogitTuner
from onnxslim_llm.stats.calibration import Calibration, Feeds, TensorCalibration, TokenCalibration
from onnxslim_llm.stats.observe import GraphObserver, Observer
from onnxslim_llm.stats.replay import Replayer, SourceReplayer

if TYPE_CHECKING:
    from onnxslim_llm.gradients.source import GradientSource
    from onnxslim_llm.gradients.tuning import CodeTuner
    from onnxslim_llm.rewrite.passes import Pass
    from onnxslim_llm.runtime.session import Session

__all__ = ["SampleSource", "make_gradient_source", "make_observer", "make_replayer", "make_tuner", "text_of_steps"]

#: Without data what is no decoder gets so many samples of random inputs, of so many elements a dimension.
_MADE_UP_SAMPLES = 16
_MADE_UP_LENGTH = 32
_OWN_TEXT = "text that the model wrote itself"


def make_observer(calibrator: Calibrator) -> Observer:
    """Return what passes observe tensors with; nothing is run or read before they do."""
    return GraphObserver(
        SampleSource(calibrator).feeds,
        threads=calibrator.threads,
        progress=lambda done: calibrator.progress.advance(done),
    )


def make_gradient_source(calibrator: Calibrator) -> GradientSource:
    """Return what passes ask for figures of gradients; torch is loaded when they do."""
    source = SampleSource(calibrator, "calibrate: gradients of the answer")
    return GradientScorer(
        source.feeds,
        calibrator.folder / "gradients",
        threads=calibrator.threads,
        progress=lambda done, total: calibrator.progress.advance(done, f"{done} of {total}"),
    )


def make_tuner(calibrator: Calibrator) -> CodeTuner | None:
    """Return what passes tune coded weights with; None where there are no calibration data. Torch is loaded then."""
    if calibrator.data is None:
        return None
    return LogitTuner(
        calibrator.source,
        SampleSource(calibrator, "tune codes").data,
        threads=calibrator.threads,
        progress=lambda done, total, text: calibrator.progress.advance(done, f"{text} (of {total} steps)"),
    )


def make_replayer(calibrator: Calibrator) -> Replayer:
    """Return what passes code weights in order with: the user's data, or what the model has written for statistics."""
    calibrator = calibrator.any_size or calibrator
    given = calibrator if calibrator.data is not None else replace(calibrator, data=Path(SELF))
    return SourceReplayer(
        calibrator.source,
        SampleSource(given, "recode in order").data,
        calibrator.folder / "replay",
        threads=calibrator.threads,
        progress=lambda done, total: calibrator.progress.advance(done, f"{done} of {total}"),
    )


@dataclass
class SampleSource:
    """The calibration data of a compile, read once.

    Attributes:
        calibrator: Knows where they are.
        stage: What the user is told that they are read for.
    """

    calibrator: Calibrator
    stage: str = "calibrate"
    _data: Calibration | None = field(default=None, repr=False)

    def feeds(self, session: Session) -> Iterator[Feeds]:
        """Yield the inputs of every sample for a model that passes have made of the source.

        Raises:
            UsageError: The data do not fit the model.
        """
        data = self.data()
        if isinstance(data, TokenCalibration):
            yield from _token_feeds(session, data)
        else:
            yield from data.feeds()

    def data(self) -> Calibration:
        """Return the data.

        Raises:
            UsageError: They do not fit the model.
        """
        if self._data is None:
            self.calibrator.progress.stage(self.stage, None, "samples")
            self._data = self._read()
        return self._data

    def _read(self) -> Calibration:
        from onnxslim_llm.runtime.session import open_session

        source = open_session(self.calibrator.source, threads=self.calibrator.threads)
        if self.calibrator.data is not None:
            return self.calibrator.calibration(source)
        made, what = _made_up(self.calibrator, source)
        _tell(self.calibrator, what)
        return made


def text_of_steps(calibrator: Calibrator, passes: Iterable[Pass]) -> NDArray[np.int64] | None:
    """Return the tokens that the caches of a graph of steps are filled with; None where random ones will do.

    Args:
        calibrator: Knows the source before its sizes were fixed.
        passes: What the graph will go through: where ranges are taken from its samples, the model writes them a text
            if the user has none.

    Raises:
        UsageError: The user's data do not fit the model.
    """
    tokens = calibrator.tokens()
    given = calibrator.data
    if tokens is not None or (str(given) != SELF if given is not None else all(p.group != "qdq" for p in passes)):
        return tokens
    from onnxslim_llm.runtime.session import open_session
    from onnxslim_llm.runtime.signature import find_decoder

    source = open_session(calibrator.source, threads=calibrator.threads)
    if find_decoder(source)[0] is None:
        return None
    if given is None:
        _tell(calibrator, _OWN_TEXT)
    data = replace(calibrator, data=Path(SELF)).calibration(source)
    return data.tokens if isinstance(data, TokenCalibration) else None


def _tell(calibrator: Calibrator, what: str) -> None:
    note = f"no calibration data: ranges of activations come from {what}; --calib FILE gives better ones"
    if note not in calibrator.notes:
        calibrator.notes.append(note)
        calibrator.progress.note(note)


def _made_up(calibrator: Calibrator, session: Session) -> tuple[Calibration, str]:
    from onnxslim_llm.runtime.feeds import index_bounds, random_feeds, sizes_of
    from onnxslim_llm.runtime.session import open_session
    from onnxslim_llm.runtime.signature import find_decoder

    if find_decoder(session)[0] is not None:
        free = calibrator.any_size or calibrator
        source = session if free is calibrator else open_session(free.source, threads=calibrator.threads)
        return replace(free, data=Path(SELF)).calibration(source), _OWN_TEXT
    rng = np.random.default_rng(0)
    bounds = index_bounds(calibrator.stub())
    sizes = sizes_of(session.inputs, batch=1, length=_MADE_UP_LENGTH)
    samples = [random_feeds(session.inputs, sizes, rng, bounds=bounds) for _ in range(_MADE_UP_SAMPLES)]
    return TensorCalibration(tuple(samples)), "random inputs"


def _token_feeds(session: Session, data: TokenCalibration) -> Iterator[Feeds]:
    from onnxslim_llm.runtime.decoder import DecoderRunner
    from onnxslim_llm.runtime.signature import DecoderSignature

    signature = DecoderSignature.of(session)
    runner = DecoderRunner(session, signature)
    rows, length = signature.batch or 1, signature.length or min(data.window, len(data.tokens) or 1)
    whole = _filled(data.tokens, rows * length).reshape(-1, rows, length)
    if signature.mask is not None and length > 1:
        yield runner.arrays(whole[0], _padded(rows, length))
    for ids in whole:
        yield runner.arrays(ids)
    rest = data.tokens[whole.size :]
    if rest.size and signature.length is None and rows == 1:
        yield runner.arrays(rest[None])


def _padded(rows: int, length: int) -> NDArray[np.int64]:
    """Return a mask that leaves out the end: without padding a mask is all zeros, and its range nothing."""
    mask = np.ones((rows, length), np.int64)
    mask[:, -max(1, length // 4) :] = 0
    return mask


def _filled(tokens: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Return as many whole samples of `size` tokens as there are, at least one: a short text is repeated.

    Raises:
        UsageError: There are no tokens.
    """
    if not tokens.size:
        raise UsageError("the calibration data hold no tokens", where="--calib", todo="give a longer text")
    count = max(1, len(tokens) // size)
    return np.resize(tokens, count * size)
