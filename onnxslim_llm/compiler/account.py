"""The account of a compile: figures of source, passes, weights and artifact, put together into the manifest."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxslim_llm import __version__
from onnxslim_llm.artifact.environment import read_environment
from onnxslim_llm.artifact.hashing import hash_files
from onnxslim_llm.artifact.manifest import (
    SKIPPED_LISTED,
    Artifact,
    Cost,
    FileEntry,
    FusionEntry,
    Generation,
    GraphEntry,
    LayerError,
    Manifest,
    PassEntry,
    Quality,
    SkippedSite,
    Source,
    Tool,
    Verify,
    created_now,
)
from onnxslim_llm.compiler.fusion import FusionReport
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.save import SaveReport
from onnxslim_llm.ir.weights import MappedWeight, weight_of
from onnxslim_llm.recipe import Recipe
from onnxslim_llm.report.sizes import bytes_by_role, weight_uses
from onnxslim_llm.rewrite.pipeline import PassRecord

__all__ = ["Account", "ModelFigures", "describe", "make_manifest", "peak_rss_bytes"]

_RUNTIME_DOMAIN = "com.microsoft::"
"""ONNX Runtime's own operators: the onnx package does not define them, and everybody uses them."""


@dataclass(frozen=True)
class ModelFigures:
    """What the manifest says of a model, source or artifact.

    Attributes:
        opset: Domain -> version.
        ops: Operator -> number of nodes, subgraphs included.
        weight_bytes: Bytes of weights, each distinct content once.
        roles: Role -> bytes.
        producer: Name and version of the exporter.
    """

    opset: dict[str, int]
    ops: dict[str, int]
    weight_bytes: int
    roles: dict[str, int]
    producer: str


def describe(model: Model) -> ModelFigures:
    """Return the figures of a model; no weight is read."""
    producer = " ".join(filter(None, (model.graph.producer_name, model.graph.producer_version)))
    opset = {item.domain: int(item.version) for item in model.graph.import_domains or []}
    ops = dict(sorted(model.census().items()))
    return ModelFigures(opset, ops, model.weight_bytes(), bytes_by_role(weight_uses(model)), producer)


#: Names for the places that passes choose more bits for.
_PLACES = {
    "embedding": "embedding",
    "lm_head": "classifier",
    "value": "attention values",
    "output": "attention output",
    "first_block": "first block",
}


@dataclass
class Account:
    """Collects the figures while the compile goes on."""

    source: Path
    target: str
    threads: int
    recipe: Recipe | None = None
    before: ModelFigures | None = None
    roles: dict[str, str] = field(default_factory=dict)
    after: ModelFigures | None = None
    source_data: list[Path] = field(default_factory=list)
    passes: list[PassRecord] = field(default_factory=list)
    fusion: tuple[FusionReport, ...] = ()
    layers: list[LayerError] = field(default_factory=list)
    saved: SaveReport | None = None
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a remark for the user, once."""
        if text not in self.notes:
            self.notes.append(text)

    def opened(self, model: Model) -> None:
        """Take the figures of the source."""
        self.before = describe(model)
        self.roles = {use.name: use.role for use in weight_uses(model)}
        weights = (weight_of(tensor) for tensor in model.constants())
        files = {w.file.path for w in weights if isinstance(w, MappedWeight)}
        self.source_data = sorted(f for f in files if f.resolve() != self.source.resolve())
        for note in model.notes:
            self.note(note)
        unknown = [name for name in model.unknown_ops() if not name.startswith(_RUNTIME_DOMAIN)]
        if unknown:
            self.note(f"kept as they are, since ONNX has no definition of them: {', '.join(unknown)}")

    def finished(self, model: Model, report: SaveReport, records: list[PassRecord]) -> None:
        """Take the figures of the artifact."""
        self.after = describe(model)
        self.saved = report
        self.passes = records
        self.layers = _layer_errors(report, self.roles, _choices(records))


def _layer_errors(
    report: SaveReport, roles: dict[str, str], choices: Mapping[str, Mapping[str, Any]]
) -> list[LayerError]:
    fewest = min((choice["bits"] for choice in choices.values() if choice.get("bits")), default=0)
    return [
        LayerError(
            name=name,
            role=roles.get(name, "other"),
            bits=figures.get("bits"),
            block=choices.get(name, {}).get("block"),
            reason=_reason(choices.get(name, {}), fewest),
            relative_error=figures["relative_error"],
            predicted_error=figures.get("relative_output_error"),
        )
        for name, figures in _by_weight(report)
        if "relative_error" in figures
    ]


def _choices(records: list[PassRecord]) -> dict[str, Mapping[str, Any]]:
    """What passes say they chose for each weight, by its name."""
    listed = [entry for record in records for entry in record.detail.get("tensors", ())]
    return {entry["name"]: entry for entry in listed if isinstance(entry, Mapping) and "name" in entry}


def _reason(choice: Mapping[str, Any], fewest: int) -> str:
    """Why a weight has more bits than others: in the pass's own words, or by its place in the model."""
    if choice.get("reason"):
        return str(choice["reason"])
    if (choice.get("bits") or 0) <= fewest:
        return ""
    places = [_PLACES[role] for role in choice.get("roles", ()) if role in _PLACES]
    return f"its place: {', '.join(places)}" if places else ""


def _by_weight(report: SaveReport) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the figures of each weight; those that were packed into one are told apart."""
    for name, figures in report.weights.items():
        yield from figures.get("parts", {name: figures}).items()


def make_manifest(
    account: Account,
    directory: Path,
    source_files: list[FileEntry],
    *,
    artifact_names: list[str],
    carried: list[str],
    verify: Verify | None,
    quality: Quality | None,
    graphs: Sequence[GraphEntry] = (),
    generation: Generation | None = None,
    seconds: float,
) -> Manifest:
    """Return the manifest of the artifact in `directory`.

    Args:
        account: The figures.
        directory: Folder that holds the artifact's files.
        source_files: Hashes of the .onnx file (first) and its external data.
        artifact_names: Files of the model, relative to `directory`.
        carried: Files that were carried along.
        verify: Result of the verification, if there was one.
        quality: Figures on a text, if there was one.
        graphs: Each graph's, where there are several.
        generation: What they write together.
        seconds: Time of the whole compile.
    """
    before, after, saved, recipe = account.before, account.after, account.saved, account.recipe
    assert before
    assert after
    assert saved
    assert recipe
    files = hash_files(directory, artifact_names)
    return Manifest(
        tool=Tool(version=__version__),
        created=created_now(),
        source=Source(
            path=str(account.source),
            sha256=source_files[0].sha256 or "",
            bytes=sum(f.bytes for f in source_files),
            opset=before.opset,
            producer=before.producer,
            ops=before.ops,
            files=source_files,
            weight_bytes=before.weight_bytes,
            bytes_by_role=before.roles,
        ),
        artifact=Artifact(
            files=files,
            bytes=sum(f.bytes for f in files),
            opset=after.opset,
            ops=after.ops,
            carried=hash_files(directory, carried),
            weight_bytes=after.weight_bytes,
            bytes_by_role=after.roles,
        ),
        target=account.target,
        recipe=recipe.resolved(),
        environment=read_environment(account.threads),
        passes=[_pass_entry(record) for record in account.passes],
        fusion=[_fusion_entry(report) for report in account.fusion],
        layers=account.layers,
        verify=verify,
        quality=quality,
        graphs=list(graphs),
        generation=generation,
        cost=Cost(
            seconds=seconds,
            peak_rss_bytes=peak_rss_bytes(),
            bytes_read=saved.bytes_read,
            bytes_written=saved.bytes_written,
        ),
        notes=account.notes,
    )


def _pass_entry(record: PassRecord) -> PassEntry:
    listed = [SkippedSite(where=s.where, reason=s.reason) for s in record.skipped[:SKIPPED_LISTED]]
    options: dict[str, Any] = record.options
    return PassEntry(
        name=record.name,
        options=options,
        seconds=record.seconds,
        changed=record.changed,
        skipped_count=len(record.skipped),
        skipped=listed,
        nodes=record.nodes,
        bytes=record.bytes,
        rolled_back=bool(record.rolled_back),
        rolled_back_reason=record.rolled_back,
        detail=record.detail,
    )


def _fusion_entry(report: FusionReport) -> FusionEntry:
    left = [SkippedSite(where=where, reason=reason) for where, reason in report.left[:SKIPPED_LISTED]]
    return FusionEntry(kind=report.kind, sites=report.sites, fused=report.fused, left=left)


def peak_rss_bytes() -> int:
    """Return the largest resident memory of this process so far, as the system counts it (mapped pages included)."""
    try:  # the kernel's ru_maxrss starts with the memory of the process that started this one
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
