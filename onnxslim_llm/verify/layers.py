"""Where two models come apart: every tensor that has the same name in both, compared on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from onnxslim_llm.errors import ModelError
from onnxslim_llm.runtime.decoder import DecoderRunner, DecoderState
from onnxslim_llm.runtime.session import Array, Session, open_session
from onnxslim_llm.verify.cases import DecoderCase, TensorCase
from onnxslim_llm.verify.check import load_structure
from onnxslim_llm.verify.figures import ErrorSums
from onnxslim_llm.verify.inputs import make_plan

__all__ = ["LayerComparison", "LayerDifference", "compare_layers", "shared_tensors"]


@dataclass(frozen=True)
class LayerDifference:
    """The error of one tensor of the second model against the tensor of that name in the first.

    Attributes:
        name: Of the tensor.
        op: Operator that makes it in the first model.
        position: Of that operator in the first model's order.
        sqnr_db: 10 log10(signal power / error power); see `figures.SQNR_CAP_DB` for equal tensors.
        max_abs: Largest absolute difference.
        cosine: Of both tensors as vectors.
        count: Elements compared.
    """

    name: str
    op: str
    position: int
    sqnr_db: float
    max_abs: float
    cosine: float
    count: int


@dataclass(frozen=True)
class LayerComparison:
    """What `compare_layers` found.

    Attributes:
        layers: Worst first.
        inputs: Names of the cases that were run.
        skipped: (tensor, reason) of those that could not be compared.
    """

    layers: tuple[LayerDifference, ...]
    inputs: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def shared_tensors(first: onnx.ModelProto, second: onnx.ModelProto) -> dict[str, tuple[str, int]]:
    """Names of node outputs of both top graphs, with operator and position in the first; in the first's order."""
    others = {name for node in second.graph.node for name in node.output}
    return {
        name: (node.op_type, position)
        for position, node in enumerate(first.graph.node)
        for name in node.output
        if name and name in others
    }


def compare_layers(
    first: Path,
    second: Path,
    *,
    token_ids: Sequence[int] | None = None,
    arrays: Path | None = None,
    threads: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LayerComparison:
    """Run both models on the same inputs and compare the tensors that kept their names.

    Both are opened without graph optimisations. Padded text is left out: what a model computes at padding is nobody's
    business.

    Args:
        first: The reference, an .onnx file.
        second: The other .onnx file.
        token_ids: Real text for a decoder; random ids without.
        arrays: .npz/.npy inputs for other models; made up without.
        threads: Of ONNX Runtime; 0 leaves it to ONNX Runtime.
        progress: Called with (done, of how many) cases.

    Raises:
        ModelError: A model cannot be opened or run, or the two do not take the same inputs.
        UsageError: The given inputs do not fit.
    """
    protos = load_structure(first), load_structure(second)
    tensors = shared_tensors(*protos)
    plan = make_plan(open_session(first, threads=threads, optimise=False), token_ids=token_ids, arrays=arrays)
    sessions = [_tap(proto, path, tensors, threads) for proto, path in zip(protos, (first, second), strict=True)]
    sums: dict[str, ErrorSums] = {}
    skipped: dict[str, str] = {}
    names: list[str] = []
    cases = [case for case in plan.cases if not _is_padded(case)]
    for done, case in enumerate(cases):
        for expected, got in _runs(sessions, case):
            _add(sums, skipped, expected, got)
        names.append(case.name)
        if progress:
            progress(done + 1, len(cases))
    layers = []
    for name, total in sums.items():
        figures, (op, position) = total.figures(), tensors[name]
        layers.append(
            LayerDifference(name, op, position, figures.sqnr_db, figures.max_abs, figures.cosine, figures.count)
        )
    layers.sort(key=lambda layer: (layer.sqnr_db, layer.position))
    return LayerComparison(tuple(layers), tuple(names), tuple(skipped.items()))


class _TappedSession(Session):
    """A session that hands out `taps` beside what was asked for."""

    def __init__(self, inner: Session, taps: Sequence[str]) -> None:
        super().__init__(inner.inference, inner.where)
        self.taps = tuple(taps)
        self.tapped: dict[str, Any] = {}

    def run_values(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        asked = [info.name for info in self.outputs] if outputs is None else list(outputs)
        values = super().run_values(feeds, [*asked, *(name for name in self.taps if name not in asked)])
        self.tapped = {name: values[name] for name in self.taps}
        return {name: values[name] for name in asked}

    def take(self) -> dict[str, Array]:
        """The tapped arrays of the last run."""
        tapped, self.tapped = self.tapped, {}
        return {name: self.array(value) for name, value in tapped.items()}


def _tap(proto: onnx.ModelProto, path: Path, tensors: Mapping[str, object], threads: int) -> _TappedSession:
    known = {value.name for value in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in known)
    session = open_session(proto, threads=threads, optimise=False, base_dir=path.parent)
    floats = [info.name for info in session.outputs if info.name in tensors and _is_float(info.dtype)]
    # The extra outputs are ours: a decoder's signature must be told from the model's own.
    tapped = _TappedSession(session, floats)
    tapped.outputs = tuple(info for info in session.outputs if info.name in known)
    return tapped


def _is_float(dtype: Any) -> bool:
    return dtype is not None and (dtype.kind == "f" or dtype.name == "bfloat16")


def _is_padded(case: DecoderCase | TensorCase) -> bool:
    return isinstance(case, DecoderCase) and any(not mask.all() for _, mask in case.pieces)


def _runs(
    sessions: Sequence[_TappedSession], case: DecoderCase | TensorCase
) -> Iterator[tuple[dict[str, Array], dict[str, Array]]]:
    """Yield the tapped tensors of both models after each run of a case."""
    ours, theirs = sessions
    if isinstance(case, TensorCase):
        for session in sessions:
            missing = {info.name for info in session.inputs} - case.feeds.keys()
            if missing:
                raise ModelError(f"the models do not take the same inputs: '{min(missing)}'", where=session.where)
            session.run({info.name: case.feeds[info.name] for info in session.inputs})
        yield ours.take(), theirs.take()
        return
    runners = [DecoderRunner(session) for session in sessions]
    states: list[DecoderState | None] = [None, None]
    for ids, mask in case.pieces:
        for i, runner in enumerate(runners):
            _, states[i] = runner.extend(ids, states[i], mask)
        yield ours.take(), theirs.take()


def _add(
    sums: dict[str, ErrorSums], skipped: dict[str, str], expected: Mapping[str, Array], got: Mapping[str, Array]
) -> None:
    for name in expected.keys() & got.keys():
        if expected[name].shape != got[name].shape:
            skipped[name] = f"shapes {list(expected[name].shape)} and {list(got[name].shape)}"
            sums.pop(name, None)
        elif name not in skipped:
            sums.setdefault(name, ErrorSums()).add(expected[name], got[name])
