"""Which graphs an artifact has: one, or two of fixed sizes that share their weights, for prompts and for steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnxslim_llm.compiler.calibration import Calibrator
from onnxslim_llm.compiler.fixed_source import FixedSource, Shapes
from onnxslim_llm.compiler.verification import Judge
from onnxslim_llm.errors import UsageError, did_you_mean
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.shapes.fixing import OPTION
from onnxslim_llm.rewrite.passes import Pass
from onnxslim_llm.runtime.signature import find_decoder
from onnxslim_llm.targets import Target

__all__ = ["DECODE", "MODEL_NAME", "PREFILL", "GraphPlan", "GraphShape", "parse_graphs", "shapes_of"]

MODEL_NAME = "model.onnx"
PREFILL, DECODE = "prefill", "decode"
_FILES = {PREFILL: MODEL_NAME, DECODE: "decode.onnx"}
_EXAMPLE = f"{OPTION} batch=1 {OPTION} prefill:seq=128,past=0 {OPTION} decode:seq=1,past=511"


@dataclass(frozen=True)
class GraphShape:
    """The sizes of one graph.

    Attributes:
        name: "prefill" or "decode"; "" for the only one.
        sizes: Such as "batch=1,seq=128".
    """

    name: str
    sizes: str

    @property
    def file(self) -> str:
        """Name of its file in the artifact."""
        return _FILES.get(self.name, MODEL_NAME)


@dataclass
class GraphPlan:
    """How one graph of the artifact is made and verified.

    Attributes:
        shape: Its name and sizes.
        passes: What makes it of the source.
        judge: Compares it with the source.
        calibrator: Has the inputs that fit it.
        fixed: The source with its sizes; None where they are not fixed.
    """

    shape: GraphShape
    passes: list[Pass]
    judge: Judge
    calibrator: Calibrator
    fixed: FixedSource | None = None

    def path(self, directory: Path) -> Path:
        """Return its file in the folder of the artifact."""
        return directory / self.shape.file


def parse_graphs(shape: str | Sequence[str]) -> tuple[GraphShape, ...]:
    """Return the graphs that --shape asks for: one, or a pair if sizes are given to "prefill:" and "decode:".

    Args:
        shape: Texts like "batch=1,seq=128"; with "prefill:" or "decode:" in front they hold for that graph, and those
            without for both.

    Raises:
        UsageError: Another name stands in front, or one of the two is missing.
    """
    common: list[str] = []
    named: dict[str, list[str]] = {}
    for text in [shape] if isinstance(shape, str) else shape:
        head, colon, sizes = text.partition(":")
        if not colon or "=" in head:
            common.append(text)
        elif head.strip() in _FILES:
            named.setdefault(head.strip(), []).append(sizes)
        else:
            raise UsageError(f"there is no graph '{head}'", where=OPTION, todo=did_you_mean(head, _FILES))
    if not named:
        return (GraphShape("", _joined(common)),)
    for name in _FILES:
        if name not in named:
            raise UsageError(f"the sizes of the graph '{name}' are missing", where=OPTION, todo=f"write {_EXAMPLE}")
    return tuple(GraphShape(name, _joined([*common, *named[name]])) for name in _FILES)


def shapes_of(model: Model, target: Target, graphs: Sequence[GraphShape]) -> list[Shapes]:
    """Resolve the sizes of all graphs; those of a pair get tables of positions that are long enough for both.

    Raises:
        UsageError: A name fits no dimension, a size is missing, or the model is no decoder with a KV cache, of which
            alone there is a pair.
    """
    if len(graphs) > 1:
        signature, why = find_decoder(model.to_proto("omit"))
        if signature is None or not signature.caches:
            what = f"a pair of graphs needs a decoder with a KV cache: {why or 'the model has none'}"
            todo = "compile it with --add-kv-cache first (target portable, recipe safe)" if not why else ""
            raise UsageError(what, where=OPTION, todo=todo)
    found = [Shapes.of(model, target, graph.sizes) for graph in graphs]
    longest = max(shapes.positions for shapes in found)
    return [replace(shapes, positions=longest) for shapes in found]


def _joined(texts: Sequence[str]) -> str:
    return ",".join(text.strip() for text in texts if text.strip())
