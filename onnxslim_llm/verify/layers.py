"""Where two models begin to differ: every tensor that both name, on the same inputs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from onnxslim_llm.errors import ModelError
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.session import Session, open_session
from onnxslim_llm.verify.cases import DecoderCase, TensorCase
from onnxslim_llm.verify.check import SOURCE_CONFIG, load_structure
from onnxslim_llm.verify.compare import Progress
from onnxslim_llm.verify.figures import ErrorSums
from onnxslim_llm.verify.inputs import make_plan

__all__ = ["LayerComparison", "LayerError", "compare_layers"]


@dataclass(frozen=True)
class LayerError:
    """Error of one tensor, see `figures.ErrorFigures`; `op` is the operator that makes it in the second model."""

    name: str
    op: str
    max_abs: float
    sqnr_db: float
    cosine: float
    nonfinite: int


@dataclass(frozen=True)
class LayerComparison:
    """All compared tensors, worst first, and the inputs they were compared on."""

    inputs: str
    layers: tuple[LayerError, ...]
    skipped: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        skipped = [{"where": where, "reason": reason} for where, reason in self.skipped]
        return {"inputs": self.inputs, "layers": [asdict(layer) for layer in self.layers], "skipped": skipped}


def compare_layers(
    first: str | Path,
    second: str | Path,
    *,
    threads: int = 0,
    token_ids: Sequence[int] | None = None,
    names: Collection[str] | None = None,
    progress: Progress | None = None,
) -> LayerComparison:
    """Run both models once on the inputs of the first and compare the floating-point tensors of the same name.

    Both run without graph optimisations, which would remove tensors; a runtime's own error (int8 activations inside an
    int4 kernel) is still part of it.

    Args:
        first: the reference.
        second: compared with it.
        threads: of ONNX Runtime; 0 leaves it to ONNX Runtime.
        token_ids: tokens of real text for a decoder; random ones are used without.
        names: of the tensors to compare; all that both models name by default.
        progress: called with (done, of how many) runs.

    Raises:
        ModelError: a model cannot be opened or run, or they share no tensor.
    """
    tell = progress or (lambda done, total: None)
    protos = [load_structure(first), load_structure(second)]
    makers = [_makers(proto) for proto in protos]
    shared = [name for name in makers[0] if name in makers[1] and (names is None or name in names)]
    plain = open_session(first, threads=threads, optimise=False, config=SOURCE_CONFIG)
    plan = make_plan(plain, proto=protos[0], token_ids=token_ids)
    tell(1, 3)
    del plain
    sessions = [
        _open(proto, Path(path).parent, shared, threads) for proto, path in zip(protos, (first, second), strict=True)
    ]
    compared = _comparable(sessions, shared)
    if not compared:
        raise ModelError(
            "the models share no floating-point tensor",
            where=f"{first} and {second}",
            todo="`onnxslim-llm diff --no-run` compares operators and bytes only",
        )
    outputs = []
    for done, session in enumerate(sessions):
        outputs.append(session.run_values(_feeds(session, plan.cases[0]), compared))
        tell(done + 2, 3)
    layers: list[LayerError] = []
    skipped: list[tuple[str, str]] = []
    for name in compared:
        a, b = (session.array(values.pop(name)) for session, values in zip(sessions, outputs, strict=True))
        if a.shape != b.shape:
            skipped.append((name, f"the shapes differ: {list(a.shape)} and {list(b.shape)}"))
            continue
        sums = ErrorSums()
        sums.add(a, b)
        found = sums.figures()
        layers.append(LayerError(name, makers[1][name], found.max_abs, found.sqnr_db, found.cosine, sums.nonfinite))
    layers.sort(key=lambda layer: (-layer.nonfinite, layer.sqnr_db))
    return LayerComparison(plan.cases[0].name, tuple(layers), tuple(skipped))


def _makers(proto: onnx.ModelProto) -> dict[str, str]:
    """Operator by the name of each tensor that a node of the top graph makes."""
    return {name: node.op_type for node in proto.graph.node for name in node.output if name}


def _open(proto: onnx.ModelProto, folder: Path, names: Sequence[str], threads: int) -> Session:
    """Open the model with `names` as additional outputs; ONNX Runtime infers their types."""
    known = {output.name for output in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    return open_session(proto, threads=threads, optimise=False, config=SOURCE_CONFIG, base_dir=folder.resolve())


def _comparable(sessions: Sequence[Session], names: Sequence[str]) -> list[str]:
    kinds = [{info.name: info.dtype for info in session.outputs} for session in sessions]
    return [name for name in names if all(_floating(kind.get(name)) for kind in kinds)]


def _floating(dtype: Any) -> bool:
    return dtype is not None and (dtype.kind == "f" or dtype.name == "bfloat16")


def _feeds(session: Session, case: DecoderCase | TensorCase) -> dict[str, Any]:
    if isinstance(case, TensorCase):
        return {info.name: session.value(case.feeds[info.name]) for info in session.inputs}
    ids, mask = case.pieces[0]
    return DecoderRunner(session).feeds(ids, mask)
