"""manifest.json: what went in, what came out, and the figures that prove it still works.

The schema is versioned and additive: a reader of version 1.x accepts every 1.y, unknown fields included. Bytes are
bytes, times are seconds, and a figure that is not a finite number (the SQNR of an exact copy, say) is null.
`docs/manifest.schema.json` is exported from these models by `python -m onnxslim_llm.artifact.manifest`.
"""

from __future__ import annotations

import json
import math
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from onnxslim_llm.errors import ModelError

__all__ = [
    "MANIFEST_NAME",
    "REPORT_NAME",
    "SKIPPED_LISTED",
    "TOOL_NAME",
    "Artifact",
    "Cost",
    "Environment",
    "FileEntry",
    "FusionEntry",
    "Gate",
    "LayerError",
    "Manifest",
    "PassEntry",
    "Quality",
    "SkippedSite",
    "Source",
    "Tool",
    "Verify",
    "created_now",
    "json_schema",
    "read_manifest",
]

MANIFEST_NAME = "manifest.json"
REPORT_NAME = "report.html"
TOOL_NAME = "onnxslim-llm"
SKIPPED_LISTED = 50
"""At most this many skipped sites are listed for a pass; `skipped_count` has their true number."""


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: such a figure is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Figure = Annotated[float | None, BeforeValidator(_finite)]


def _unicode(value: Any) -> Any:
    """JSON is Unicode, a file's name may be any bytes: those that are no text become question marks."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


PathText = Annotated[str, BeforeValidator(_unicode)]


class _Record(BaseModel):
    # Additive schema: what a later version writes is kept, not refused.
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow", ser_json_inf_nan="null")


class Tool(_Record):
    """The program that wrote the artifact."""

    name: str = TOOL_NAME
    version: str


class FileEntry(_Record):
    """One file. `path` is relative to the manifest's folder (a source's: to the source model's folder)."""

    path: PathText
    bytes: int = Field(ge=0)
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")


class Source(_Record):
    """The model that was compiled. `sha256` is of the .onnx file itself; `bytes` counts its external data too."""

    path: PathText
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)
    opset: dict[str, int] = Field(description="domain to version; the default domain is ''")
    producer: str = ""
    ops: dict[str, int] = Field(description="operator to number of nodes")
    files: list[FileEntry] = Field(default_factory=list, description="the .onnx and its external data files")
    weight_bytes: int | None = Field(default=None, ge=0, description="each distinct weight counted once")
    bytes_by_role: dict[str, int] = Field(default_factory=dict)


class Artifact(_Record):
    """The model that was written. `bytes` is of `files`, the model; files carried along are listed apart."""

    files: list[FileEntry]
    bytes: int = Field(ge=0)
    opset: dict[str, int]
    ops: dict[str, int]
    carried: list[FileEntry] = Field(default_factory=list, description="tokenizer, config and the like")
    weight_bytes: int | None = Field(default=None, ge=0)
    bytes_by_role: dict[str, int] = Field(default_factory=dict)


class Environment(_Record):
    """The machine and the libraries."""

    python: str
    onnxruntime: str | None
    cpu_features: list[str]
    threads: int = Field(ge=1)
    onnx: str | None = None
    numpy: str | None = None
    platform: str = ""
    cpu: str = ""


class SkippedSite(_Record):
    """A place that a pass looked at and left alone."""

    where: str
    reason: str


class PassEntry(_Record):
    """What one pass did. `changed` is the number of sites; nodes and bytes are [before, after]."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    seconds: float = Field(ge=0)
    changed: int = Field(ge=0)
    skipped_count: int = Field(default=0, ge=0)
    skipped: list[SkippedSite] = Field(default_factory=list, max_length=SKIPPED_LISTED)
    nodes: tuple[int, int]
    bytes: tuple[int, int]
    rolled_back: bool = False
    rolled_back_reason: str = ""
    detail: dict[str, Any] = Field(default_factory=dict)


class FusionEntry(_Record):
    """Attentions, norms or rotary embeddings of the source. `sites` is counted without the rules that fuse them."""

    kind: str = Field(description="attention, norm or rotary")
    sites: int = Field(ge=0)
    fused: int = Field(ge=0, description="those that are one operator, be it from the source")
    left: list[SkippedSite] = Field(
        default_factory=list, max_length=SKIPPED_LISTED, description="the others: the rule that came nearest, and why"
    )


class LayerError(_Record):
    """The error of one compressed weight: ||w - w'|| / ||w||, from the weight job itself."""

    name: str
    role: str = "other"
    bits: float | None = None
    block: int | None = Field(default=None, description="elements that share a scale; 0 for a whole column")
    reason: str = Field(default="", description="why it has more bits than others")
    relative_error: Figure = None
    predicted_error: Figure = Field(
        default=None, description="of the product's output: root of tr(E'HE) / tr(W'HW) on held-out calibration data"
    )
    sqnr_db: Figure = Field(
        default=None, description="of the product's output in the artifact, everything before it compressed, too"
    )


class Gate(_Record):
    """One condition on the artifact. `comparison` says on which side of `limit` the value must be."""

    name: str
    limit: Figure
    value: Figure
    ok: bool
    comparison: str = Field(default="<=", pattern="^(<=|>=|<|>|==)$")


class Verify(_Record):
    """Source and artifact on the same inputs, in the target's own runtime."""

    inputs: list[str] | int = Field(description="what was fed: names of the input sets, or their number")
    max_abs: Figure = None
    max_rel: Figure = None
    sqnr_db: Figure = None
    cosine: Figure = None
    kl_mean: Figure = None
    top1_agreement: Figure = None
    greedy_prefix_match: Figure = None
    gates: list[Gate] = Field(default_factory=list)


class Quality(_Record):
    """Language quality on a given text."""

    tokens: int = Field(ge=0)
    ppl_source: Figure = None
    ppl_artifact: Figure = None
    kld_mean: Figure = None
    kld_p99: Figure = None
    top1_agreement: Figure = None


class GraphEntry(_Record):
    """One graph of an artifact that has several."""

    name: str = Field(description="prefill or decode")
    path: str = Field(description="its .onnx file in the artifact's folder")
    sizes: str = Field(description="as --shape gave them")
    verify: Verify | None = None


class Generation(_Record):
    """A prompt through one graph, further tokens through the other; the source's choices are fed to both sides."""

    prompt_tokens: int = Field(ge=1)
    tokens: int = Field(ge=1)
    top1_agreement: Figure = None
    kl_mean: Figure = None
    greedy_prefix_match: Figure = None


class Cost(_Record):
    """What the compile took."""

    seconds: float = Field(ge=0)
    peak_rss_bytes: int = Field(ge=0)
    bytes_read: int = Field(ge=0)
    bytes_written: int = Field(ge=0)


class Manifest(_Record):
    """The whole of manifest.json."""

    schema_version: str = Field(default="1.0", pattern=r"^1\.\d+$")
    tool: Tool
    created: str = Field(description="UTC, ISO 8601; SOURCE_DATE_EPOCH is respected")
    source: Source
    artifact: Artifact
    target: str
    recipe: dict[str, Any] = Field(description="fully resolved: feeding it back gives the same artifact")
    environment: Environment
    passes: list[PassEntry] = Field(default_factory=list)
    fusion: list[FusionEntry] = Field(default_factory=list)
    layers: list[LayerError] = Field(default_factory=list)
    verify: Verify | None = None
    quality: Quality | None = None
    graphs: list[GraphEntry] = Field(default_factory=list, description="where the artifact has several")
    generation: Generation | None = Field(default=None, description="of a pair of graphs")
    cost: Cost
    notes: list[PathText] = Field(default_factory=list)

    @property
    def failed_gates(self) -> list[Gate]:
        """The gates that did not pass."""
        results = [self.verify, *(graph.verify for graph in self.graphs[1:])]
        return [gate for result in results if result is not None for gate in result.gates if not gate.ok]

    def dumps(self) -> str:
        """The text of manifest.json: two-space indented JSON with a final newline."""
        return self.model_dump_json(indent=2) + "\n"

    def write(self, path: Path) -> None:
        """Write the manifest to the file `path`."""
        path.write_text(self.dumps(), encoding="utf-8")


def created_now() -> str:
    """The time for `created`: SOURCE_DATE_EPOCH where it is set (reproducible builds), else now."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    moment = datetime.fromtimestamp(int(epoch), UTC) if epoch.isdecimal() else datetime.now(UTC)
    return moment.replace(microsecond=0).isoformat().replace("+00:00", "Z")


def read_manifest(path: Path) -> Manifest:
    """Read manifest.json, or the one in the folder `path`.

    Raises:
        ModelError: It is missing, is no JSON, or is no manifest of schema version 1.
    """
    file = path / MANIFEST_NAME if path.is_dir() else path
    try:
        return Manifest.model_validate_json(file.read_bytes())
    except OSError as error:
        raise ModelError(
            f"cannot read the manifest: {error.strerror}",
            where=str(file),
            todo="give the folder that `onnxslim-llm compile` wrote",
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ModelError(
            f"not a manifest of schema version 1: {first['msg']}",
            where=f"{file} at {place}" if place else str(file),
            todo="compile the model again with this version",
        ) from error


def json_schema() -> str:
    """The JSON schema of manifest.json, as the text that docs/manifest.schema.json holds."""
    return json.dumps(Manifest.model_json_schema(mode="serialization"), indent=2) + "\n"


if __name__ == "__main__":
    sys.stdout.write(json_schema())
