"""Look at tensors of a graph as it is between two passes, on the calibration data, without keeping any values."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import onnx
from numpy.typing import NDArray

from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.save import SaveOptions, save_model
from onnxslim_llm.runtime.session import Session, open_session
from onnxslim_llm.stats.calibration import Feeds
from onnxslim_llm.stats.refused import values_of

__all__ = ["Collector", "GraphObserver", "Observer", "open_graph"]

#: Models with more bytes of weights are run from a file of their own, so that they are not held twice.
IN_MEMORY_BYTES = 256 << 20
#: Bytes of observed tensors that one run of the model may hand out.
HELD_BYTES = 512 << 20
#: Tensors that are asked for at a time while their sizes are not known.
_UNKNOWN = 16


class Collector(Protocol):
    """Takes in one tensor, sample by sample."""

    def add(self, values: NDArray[Any]) -> None:
        """Take in the values of one sample.

        Raises:
            FloatingPointError: They are of no use; the text says what they are.
        """


class Observer(Protocol):
    """What a pass may ask about the graph that it is working on."""

    def observe(self, model: Model, collectors: Mapping[str, Collector]) -> None:
        """Run all calibration data through the model and hand the named tensors of its top graph to the collectors.

        Raises:
            ModelError: The model does not run, or a collector refuses values; the tensor is named.
        """


@dataclass
class GraphObserver:
    """Runs graphs in ONNX Runtime.

    The memory that it takes is that of one sample: what is observed is handed on and dropped.

    Attributes:
        feeds: Returns the inputs of every sample, for a model with the signature of this session.
        threads: Of the runtime.
        progress: Called after each sample.
        held_bytes: Bytes of observed tensors that are held at a time; where one sample has more of them, it runs
            several times.
    """

    feeds: Callable[[Session], Iterable[Feeds]]
    threads: int = 0
    progress: Callable[[int], None] = field(default=lambda done: None)
    held_bytes: int = HELD_BYTES

    def observe(self, model: Model, collectors: Mapping[str, Collector]) -> None:
        """See `Observer.observe`."""
        if not collectors:
            return
        with tempfile.TemporaryDirectory(prefix="observe-") as scratch:
            session = open_graph(model, Path(scratch), self.threads, collectors)
            batches: list[list[str]] | None = None
            for number, given in enumerate(self.feeds(session), 1):
                fed = {info.name: given[info.name] for info in session.inputs}
                if batches is None:
                    batches = _batches(session, fed, list(collectors), self.held_bytes)
                for names in batches:
                    for name, values in session.run(fed, names).items():
                        with values_of(name):
                            collectors[name].add(values)
                self.progress(number)


def open_graph(model: Model, scratch: Path, threads: int, outputs: Iterable[str] = ()) -> Session:
    """Open a graph as it is between two passes.

    Args:
        model: The model.
        scratch: Where a model too large to be held twice is written; needed as long as the session.
        threads: Of the runtime; 0 leaves the choice to it.
        outputs: Names of further tensors that runs can be asked for.

    Raises:
        ModelError: The runtime does not open it.
    """
    folder: Path | None = None
    if model.weight_bytes() > IN_MEMORY_BYTES:
        folder = scratch
        save_model(model, scratch / "model.onnx", SaveOptions(jobs=max(1, threads)))
        proto = onnx.load(scratch / "model.onnx", load_external_data=False)
    else:
        proto = model.to_proto("inline")
    there = {value.name for value in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs if name not in there)
    return open_session(proto, threads=threads, base_dir=folder)


def _batches(session: Session, fed: Feeds, names: list[str], limit: int) -> list[list[str]]:
    """Return the tensors in groups that take at most `limit` bytes on this sample (a single one may take more)."""
    groups: list[list[str]] = []
    used = 0
    for name, nbytes in _sizes(session, fed, names):
        if not groups or (used + nbytes > limit and used):
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += nbytes
    return groups


def _sizes(session: Session, fed: Feeds, names: list[str]) -> Iterator[tuple[str, int]]:
    for start in range(0, len(names), _UNKNOWN):
        for name, values in session.run(fed, names[start : start + _UNKNOWN]).items():
            yield name, values.nbytes
