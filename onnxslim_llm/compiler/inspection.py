"""What is in a model: blocks, operators, weights by role and type, and what a recipe would do to it and why not."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxslim_llm.compiler.account import describe
from onnxslim_llm.compiler.defaults import default_recipe
from onnxslim_llm.compiler.fusion import FusionCensus, FusionReport
from onnxslim_llm.compiler.lowering import in_order
from onnxslim_llm.ir.model import Model, open_model
from onnxslim_llm.ir.proto.external import resolve_model_path
from onnxslim_llm.ir.weights import SparseWeight, weight_of
from onnxslim_llm.ir.weights.weight import Weight
from onnxslim_llm.recipe import Recipe
from onnxslim_llm.report.sizes import WeightUse, bytes_by_dtype, bytes_by_role, weight_uses
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Pass
from onnxslim_llm.rewrite.pipeline import PassRecord, Pipeline
from onnxslim_llm.runtime.session import TensorInfo, inputs_of, outputs_of
from onnxslim_llm.runtime.signature import find_decoder
from onnxslim_llm.targets import get_target

__all__ = ["Inspection", "Port", "SiteReport", "inspect"]


@dataclass(frozen=True)
class Port:
    """An input or output: name, element type as text, dimensions (sizes, names or None)."""

    name: str
    kind: str
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class SiteReport:
    """What one pass of the recipe would do.

    Attributes:
        name: The pass.
        changed: Number of sites that it would change.
        skipped: (site, reason) of those that it would leave alone.
    """

    name: str
    changed: int
    skipped: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found. Sizes in bytes; each distinct weight counts once.

    Attributes:
        path: The .onnx file.
        producer: Exporter and version.
        opset: Domain -> version.
        inputs, outputs: The interface.
        decoder: True for a causal language model with token ids in and logits out.
        why_not_decoder: The reason if it is none.
        blocks: Number of decoder layers, told from the KV cache; 0 if unknown.
        ops: Operator -> number of nodes.
        unknown_ops: Operators without a definition; they are kept as they are.
        weight_bytes: Bytes of all weights.
        bytes_by_role, bytes_by_dtype: The same, divided.
        weights: Every distinct weight of 1 KiB and more.
        zeros: Role -> share of elements that are zero.
        recipe: The recipe that was tried.
        sites: What its passes would do.
        fusion: Attentions, norms and rotary embeddings: how many there are, how many it would fuse, and what keeps
            the others.
        notes: What was found unusual while reading.
    """

    path: str
    producer: str
    opset: dict[str, int]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    decoder: bool
    why_not_decoder: str
    blocks: int
    ops: dict[str, int]
    unknown_ops: tuple[str, ...]
    weight_bytes: int
    bytes_by_role: dict[str, int]
    bytes_by_dtype: dict[str, int]
    weights: tuple[WeightUse, ...]
    zeros: dict[str, float]
    recipe: str
    sites: tuple[SiteReport, ...]
    fusion: tuple[FusionReport, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


_LISTED_BYTES = 1024


def inspect(source: str | Path, *, recipe: str | Path | None = None, target: str = "portable") -> Inspection:
    """Look into a model; it is not changed.

    Args:
        source: An .onnx file, or a folder with exactly one.
        recipe: Whose passes are tried on a copy; default as for `compile`.
        target: The target of that trial.

    Raises:
        ModelError: The source is no valid model.
        UsageError: Unknown recipe or target.
    """
    path = resolve_model_path(source)
    model = open_model(path)
    figures = describe(model)
    proto = model.to_proto("omit")
    signature, why = find_decoder(proto)
    uses = weight_uses(model)
    chosen = Recipe.load(recipe) if recipe else default_recipe(model, get_target(target))[0]
    sites, fusion = _trial(model, chosen, target)
    return Inspection(
        path=str(path),
        producer=figures.producer,
        opset=figures.opset,
        inputs=tuple(_port(info) for info in inputs_of(proto)),
        outputs=tuple(_port(info) for info in outputs_of(proto)),
        decoder=signature is not None,
        why_not_decoder=why,
        blocks=len(signature.caches) // 2 if signature is not None else 0,
        ops=figures.ops,
        unknown_ops=tuple(model.unknown_ops()),
        weight_bytes=figures.weight_bytes,
        bytes_by_role=bytes_by_role(uses),
        bytes_by_dtype=bytes_by_dtype(uses),
        weights=tuple(use for use in uses if use.nbytes >= _LISTED_BYTES),
        zeros=_zeros(model, {use.name: use.role for use in uses}),
        recipe=chosen.name,
        sites=sites,
        fusion=fusion,
        notes=tuple(model.notes),
    )


def _port(info: TensorInfo) -> Port:
    return Port(info.name, info.kind or str(info.dtype), info.shape)


def _trial(model: Model, recipe: Recipe, target: str) -> tuple[tuple[SiteReport, ...], tuple[FusionReport, ...]]:
    goal, twin = get_target(target), model.copy()
    ordered = in_order(recipe.build(), Pipeline(goal.lowering).passes)
    passes = [step for step in ordered if not step.after_lowering]  # those run the model, which takes data and time
    census = FusionCensus(passes, twin)
    records = Pipeline(passes).run(twin, Context(target=goal), observer=_Watch(census))
    sites = tuple(SiteReport(r.name, r.changed, tuple((s.where, s.reason) for s in r.skipped)) for r in records)
    return sites, census.reports


class _Watch:
    """Lets a census see the passes of a pipeline."""

    def __init__(self, census: FusionCensus) -> None:
        self._census = census

    def pass_started(self, index: int, total: int, step: Pass) -> None:
        pass

    def pass_finished(self, index: int, total: int, record: PassRecord, model: Model) -> None:
        self._census.pass_finished(index, record, model)


def _zeros(model: Model, roles: dict[str, str]) -> dict[str, float]:
    elements: Counter[str] = Counter()
    zeros: Counter[str] = Counter()
    for tensor in model.constants():
        role = roles.get(tensor.name)
        weight = weight_of(tensor)
        if role is None or not weight.size:
            continue
        elements[role] += weight.size
        zeros[role] += _count_zeros(weight)
    return {role: zeros[role] / elements[role] for role in elements}


def _count_zeros(weight: Weight) -> int:
    if isinstance(weight, SparseWeight):
        return weight.size - int(np.count_nonzero(weight.view()))
    if not isinstance(weight.dtype, np.dtype) or weight.dtype.kind in "OSU":
        return 0
    item = weight.dtype.itemsize
    if weight.nbytes != weight.size * item:  # packed below a byte: small enough to unpack whole
        return int(np.count_nonzero(np.asarray(weight.view()).astype(np.int8) == 0))
    found = 0
    for start, piece in weight.chunks():
        found += int(np.count_nonzero(np.frombuffer(piece, weight.dtype) == 0))
        weight.release(start, start + len(memoryview(piece)))
    return found
