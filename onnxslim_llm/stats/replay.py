"""A model run beside itself with its weights coded one after the other: how inputs drift, and what they should make.

Codes that are chosen from the inputs of the float model know nothing of the errors before them. Here every product
sees the inputs that the coded weights before it really make, and can make up for what these have got wrong: GPTAQ (Li
et al. 2025, arXiv 2504.02692) calls that asymmetric calibration. Where a product's output is added to another tensor,
as to the residual stream of a transformer, the sum of both is to be right: the product makes up for the other tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from onnxslim_llm.runtime.session import Session, open_session
from onnxslim_llm.stats.calibration import Calibration
from onnxslim_llm.stats.carry import Carry
from onnxslim_llm.stats.collect import HELD_OUT_OF
from onnxslim_llm.stats.moments import Moments
from onnxslim_llm.stats.refused import values_of
from onnxslim_llm.stats.segments import Segment, extract, plan_segments
from onnxslim_llm.stats.sums import added_to
from onnxslim_llm.stats.taps import Tap, find_taps

__all__ = ["Coder", "Drift", "Replayer", "SourceReplayer"]

Array = NDArray[Any]

#: Rows multiplied at a time, as in `Moments`.
_PIECE = 1024
_TODO = "leave recode_in_order away, or give the weights before it more bits with quantize_weights.scopes"


@dataclass
class Drift:
    """Sums over the rows of a product's input, as it is and as it was: x~ and x.

    Attributes:
        size: K.
        moments: Of x~, with H~ = X~^T X~.
        crossed: X~^T (X - X~) [K, K], float32.
        beside: X~^T (R - R~) [K, N] by weight, where a tensor R is added to the product's output.
    """

    size: int
    moments: Moments = field(init=False)
    crossed: Array = field(init=False, repr=False)
    beside: dict[str, Array] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.moments = Moments(self.size)
        self.crossed = np.zeros((self.size, self.size), np.float32)

    def add(self, was: Array, now: Array, beside: Mapping[str, tuple[Array, Array]]) -> None:
        """Take in the rows of a sample: x and x~ [..., K], and by weight R and R~ [..., N].

        Raises:
            FloatingPointError: A row holds NaN, an infinite value, or one whose square is too large.
        """
        self.moments.add(now)
        old, new = (np.ascontiguousarray(rows.reshape(-1, self.size), dtype=np.float32) for rows in (was, now))
        for start in range(0, len(new), _PIECE):
            part = slice(start, start + _PIECE)
            self.crossed += new[part].T @ (old[part] - new[part])
            for weight, (before, after) in beside.items():
                lost = (before.astype(np.float32) - after).reshape(-1, before.shape[-1])
                if len(lost) == len(new):  # otherwise it is broadcast
                    self.beside[weight] = self.beside.get(weight, 0.0) + new[part].T @ lost[part]

    def pull(self, name: str, columns: Array, part: slice) -> Array:
        """Return X~^T (Y - X~ W) [K, n]: which way the product's error falls when W moves.

        Args:
            name: Of the weight.
            columns: Of W, float32 [K, n].
            part: Which ones.
        """
        result: Array = self.crossed @ columns
        beside = self.beside.get(name)
        if beside is not None and beside[:, part].shape == result.shape:
            result += beside[:, part]
        return result


class Coder(Protocol):
    """Chooses codes as the replay comes to the products."""

    def begin(self, weight: Callable[[str], Array], tables: tuple[str, ...]) -> dict[str, Array]:
        """Return what the source's tables of look-ups become, by the initializer's name and in its shape.

        Args:
            weight: Reads an initializer of the source.
            tables: Names of those that look-ups read.
        """
        ...

    def recode(self, tap: Tap, fit: Drift, held: Drift) -> dict[str, Array]:
        """Return what the weights behind a tap become, by the initializer's name and in its shape.

        Args:
            tap: What they are multiplied with.
            fit: Of the samples that codes may be fitted to.
            held: Of the others; the same if there was one sample.
        """
        ...


class Replayer(Protocol):
    """Leads a coder through the source model."""

    @property
    def threads(self) -> int:
        """How many threads a coder may use."""
        ...

    def replay(self, coder: Coder) -> None:
        """Run the source beside itself with what the coder makes of its weights.

        Raises:
            ModelError: One of both does not run on the data, or a tensor has NaN or infinite values; it is named.
            UsageError: The data do not fit the model.
        """
        ...


@dataclass(frozen=True)
class SourceReplayer:
    """See `Replayer`. Both runs hand tensors on from one product to the next on disk; memory holds one product's sums.

    Attributes:
        model: The .onnx file, external data beside it.
        data: Returns the calibration inputs.
        folder: Where tensors lie meanwhile.
        threads: For ONNX Runtime and for coders.
        progress: Called with (done, of how many) samples, all products together.
    """

    model: Path
    data: Callable[[], Calibration]
    folder: Path
    threads: int = 1
    progress: Callable[[int, int], None] | None = None

    def replay(self, coder: Coder) -> None:
        """Run through all segments, in order."""
        data = self.data()
        carries = tuple(Carry(self.folder / name, len(data)) for name in ("as-it-was", "as-it-is"))
        try:
            self._replay(coder, data, (carries[0], carries[1]))
        finally:
            for carry in carries:
                carry.clear()

    def _replay(self, coder: Coder, data: Calibration, carries: tuple[Carry, Carry]) -> None:
        proto = onnx.load(self.model, load_external_data=False)
        weights = {tensor.name: tensor for tensor in proto.graph.initializer}
        last = {name: i for i, node in enumerate(proto.graph.node) for name in node.input if name in weights}
        tables = tuple(
            dict.fromkeys(n.input[0] for n in proto.graph.node if n.op_type == "Gather" and n.input[0] in weights)
        )
        segments = plan_segments(proto.graph, find_taps(proto.graph), 0, before_readers=True)
        run = _Run(proto, self.model.parent, data, carries, self.threads, added_to(proto.graph))
        changed = coder.begin(lambda name: numpy_helper.to_array(weights[name], str(self.model.parent)), tables)
        for number, segment in enumerate(segments):
            tell = partial(self._tell, number * len(data), len(segments) * len(data))
            found = run.segment(number, segment, changed, tell)
            for tap in segment.taps:
                changed |= coder.recode(tap, *found[tap.tensor])
            changed = {name: array for name, array in changed.items() if last[name] >= segment.stop}

    def _tell(self, before: int, total: int, done: int) -> None:
        if self.progress is not None:
            self.progress(before + done, total)


@dataclass
class _Run:
    proto: onnx.ModelProto
    folder: Path
    data: Calibration
    carries: tuple[Carry, Carry]
    threads: int
    beside: Mapping[str, str]

    def segment(
        self, number: int, segment: Segment, changed: Mapping[str, Array], tell: Callable[[int], None]
    ) -> dict[str, tuple[Drift, Drift]]:
        """Run one segment over all samples, both ways; return the drift of its taps, fitted and held out."""
        made = {name for node in self.proto.graph.node[: segment.stop] for name in node.output}
        beside = {
            tap.tensor: {w: self.beside[w] for w in tap.weights if self.beside.get(w) in made} for tap in segment.taps
        }
        wanted = {tensor for found in beside.values() for tensor in found.values()}
        more = tuple(sorted(wanted - {*segment.carried_in, *segment.carried_out}))
        sums = {tap.tensor: (Drift(tap.size), Drift(tap.size)) for tap in segment.taps}
        sessions: list[Session] = []
        for sample, given in enumerate(self.data.feeds()):
            both = [
                {**given, **(carry.load(number - 1, sample, segment.carried_in) if number else {})}
                for carry in self.carries
            ]
            if not sessions and segment.stop > segment.start:
                types = {n: int(onnx.helper.np_dtype_to_tensor_dtype(both[0][n].dtype)) for n in segment.carried_in}
                part = extract(self.proto, replace(segment, carried_out=(*segment.carried_out, *more)), types)
                sessions = [self._open(part), self._open(_changed(part, changed))]
            for available, session in zip(both, sessions, strict=False):
                available |= session.run({info.name: available[info.name] for info in session.inputs})
            for tensor, (fit, held) in sums.items():
                rows = {w: (both[0][other], both[1][other]) for w, other in beside[tensor].items()}
                with values_of(tensor, "with coded weights the calibration data", _TODO):
                    (held if sample % HELD_OUT_OF == 1 else fit).add(both[0][tensor], both[1][tensor], rows)
            if segment.carried_out:
                for carry, available in zip(self.carries, both, strict=True):
                    carry.store(number, sample, {name: available[name] for name in segment.carried_out})
            tell(sample + 1)
        for carry in self.carries:
            carry.drop(number - 1)
        return {tensor: (fit, held if held.moments.count else fit) for tensor, (fit, held) in sums.items()}

    def _open(self, part: onnx.ModelProto) -> Session:
        return open_session(part, threads=self.threads, base_dir=self.folder)


def _changed(part: onnx.ModelProto, changed: Mapping[str, Array]) -> onnx.ModelProto:
    """Return a segment with other weights."""
    result = onnx.ModelProto()
    result.CopyFrom(part)
    for tensor in result.graph.initializer:
        if tensor.name in changed:
            kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(changed[tensor.name], kind), tensor.name))
    return result
