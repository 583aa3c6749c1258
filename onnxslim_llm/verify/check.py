"""One source, opened once, against any number of candidates: the verification that compile runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from onnxslim_llm.errors import ModelError
from onnxslim_llm.runtime.session import Session, open_session
from onnxslim_llm.verify.compare import Comparison, Progress, compare
from onnxslim_llm.verify.gates import Gate, GateResult, Precision, default_gates, evaluate
from onnxslim_llm.verify.inputs import Level, Plan, make_plan

__all__ = ["SOURCE_CONFIG", "Verification", "Verifier", "load_structure", "parameter_count", "precision_of"]

# The source is the reference: its weights stay as they are in the file, which also keeps them mapped instead of copied.
SOURCE_CONFIG = {"session.disable_prepacking": "1"}

# A greedy step of a large float16 source takes a second; only lossless recipes have a gate on it.
_LARGE = 200_000_000
_SHORT_GREEDY = 16

_HALF: dict[int, Precision] = {onnx.TensorProto.FLOAT16: "float16", onnx.TensorProto.BFLOAT16: "bfloat16"}


@dataclass(frozen=True)
class Verification:
    """A comparison and what the gates say to it."""

    comparison: Comparison
    gates: tuple[GateResult, ...]

    @property
    def ok(self) -> bool:
        """Whether every gate passes."""
        return all(result.ok for result in self.gates)

    @property
    def failed(self) -> tuple[GateResult, ...]:
        """The gates that do not pass."""
        return tuple(result for result in self.gates if not result.ok)

    def to_json(self) -> dict[str, Any]:
        """The manifest's `verify` object."""
        return {**self.comparison.to_json(), "gates": [asdict(result) for result in self.gates], "ok": self.ok}


class Verifier:
    """Holds the open source and the inputs that were chosen for it.

    Args:
        source: file of the source, or its proto.
        proto: the source without its weights if `source` is a file; read from there if not given.
        level: "fast" or "full".
        token_ids: tokens of real text, for a decoder.
        arrays: .npz/.npy inputs, for other models.
        threads: of ONNX Runtime; 0 leaves it to ONNX Runtime.
        stepwise: candidates have a KV cache even if the source has none: steps and chunks are compared, too.

    Raises:
        ModelError: the source cannot be opened or run.
        UsageError: the given inputs do not fit it.
    """

    def __init__(
        self,
        source: str | Path | onnx.ModelProto,
        *,
        proto: onnx.ModelProto | None = None,
        level: Level = "fast",
        token_ids: Sequence[int] | None = None,
        arrays: str | Path | None = None,
        threads: int = 0,
        stepwise: bool = False,
    ) -> None:
        self.session = open_session(source, threads=threads, optimise=False, config=SOURCE_CONFIG)
        if proto is None:
            proto = source if isinstance(source, onnx.ModelProto) else load_structure(source)
        self.precision = precision_of(proto)
        self.parameters = parameter_count(proto)
        self.plan: Plan = make_plan(
            self.session, proto=proto, level=level, token_ids=token_ids, arrays=arrays, stepwise=stepwise
        )

    def check(
        self,
        candidate: Session,
        kind: str,
        *,
        extra_gates: Iterable[Gate] = (),
        progress: Progress | None = None,
    ) -> Verification:
        """Compare `candidate` with the source and evaluate the gates of `kind`.

        Args:
            candidate: opened as it will be deployed.
            kind: see `gates.KINDS`.
            extra_gates: replace the default gate of the same figure, or add one.
            progress: called with (done, of how many) runs.

        Raises:
            ModelError: the candidate cannot be run on the inputs of the source.
            UsageError: unknown kind.
        """
        default_gates(kind, decoder=True)  # an unknown kind is refused before anything runs
        plan = self.plan
        if kind != "lossless" and self.parameters > _LARGE and plan.level == "fast":
            plan = replace(plan, greedy_tokens=min(plan.greedy_tokens, _SHORT_GREEDY))
        comparison = compare(self.session, candidate, plan, precision=self.precision, progress=progress)
        gates = {
            gate.figure: gate
            for gate in default_gates(
                kind,
                decoder=comparison.kind == "decoder",
                precision=self.precision,
                absmax=comparison.total.absmax,
                parameters=self.parameters,
            )
        }
        if comparison.greedy is None:
            gates.pop("greedy_prefix_match", None)
        gates.update({gate.figure: gate for gate in extra_gates})
        return Verification(comparison, evaluate(gates.values(), comparison.figures()))


def precision_of(proto: onnx.ModelProto) -> Precision:
    """Type of most of the floating-point weights, which is the type that a model computes in."""
    sizes: dict[Precision, int] = {"float32": 0, "float16": 0, "bfloat16": 0}
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            sizes["float32"] += math.prod(tensor.dims)
        elif tensor.data_type in _HALF:
            sizes[_HALF[tensor.data_type]] += math.prod(tensor.dims)
    return max(sizes, key=lambda precision: sizes[precision])


def parameter_count(proto: onnx.ModelProto) -> int:
    """Elements of all initializers of the top graph."""
    return sum(math.prod(tensor.dims) for tensor in proto.graph.initializer)


def load_structure(path: str | Path) -> onnx.ModelProto:
    """Read a model without its external weights.

    Raises:
        ModelError: the file is missing or no ONNX model.
    """
    try:
        return onnx.load(path, load_external_data=False)
    except FileNotFoundError as error:
        raise ModelError("there is no such model file", where=str(path)) from error
    except Exception as error:  # protobuf's DecodeError has no stable home
        raise ModelError(f"not an ONNX model: {error}", where=str(path)) from error
