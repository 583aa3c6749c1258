"""sweep.json: the compiles of a sweep, and what each of them measured.

As manifest.json the schema is additive, sizes are bytes, times are seconds, and figures that are no finite number are
null.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxslim_llm.artifact.manifest import Environment, Figure, PathText, Tool
from onnxslim_llm.errors import ModelError

__all__ = [
    "SWEEP_NAME",
    "SweepPoint",
    "SweepRecord",
    "SweepSource",
    "SweepText",
    "read_sweep",
    "setting_text",
    "sweep_csv",
]

SWEEP_NAME = "sweep.json"


class _Record(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow", ser_json_inf_nan="null")


class SweepSource(_Record):
    """The model that all points were made from."""

    path: PathText
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0, description="of the .onnx file and its external data")


class SweepText(_Record):
    """What the points were measured on. Equal hashes of tokens mean comparable figures."""

    path: PathText
    tokens: int = Field(ge=2)
    token_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    window: int = Field(ge=2)


class SweepPoint(_Record):
    """One compile. Figures are null if it failed, speeds also if they were not measured."""

    name: str
    key: str = Field(description="of model, resolved recipe, target, data and version: equal keys, equal figures")
    base: str = Field(description="name of the recipe that the settings changed")
    settings: dict[str, Any] = Field(description="values by PASS.OPTION")
    status: Literal["ok", "failed"]
    reason: str = Field(default="", description="why it failed")
    bytes: int | None = Field(default=None, ge=0, description="model and external data")
    bytes_ratio: Figure = Field(default=None, description="to the source")
    ppl: Figure = None
    ppl_ratio: Figure = Field(default=None, description="to the source, on the same tokens")
    kld_mean: Figure = Field(default=None, description="KL(source || artifact) in nats a token")
    kld_p99: Figure = None
    top1_agreement: Figure = None
    tokens_left_out: int | None = Field(
        default=None, ge=0, description="of the text, because the artifact has left them out: no figure counts them"
    )
    prefill_tokens_per_second: Figure = None
    decode_tokens_per_second: Figure = None
    prefill_ratio: Figure = Field(default=None, description="to the source: median of rounds that measure both in turn")
    decode_ratio: Figure = Field(default=None, description="to the source: median of rounds that measure both in turn")
    compile_seconds: Figure = None
    pareto: bool = Field(default=False, description="no other point has both fewer bytes and less divergence")
    recipe_file: str | None = Field(default=None, description="relative to sweep.json; reproduces the artifact")
    artifact: str | None = Field(default=None, description="folder of the artifact, relative to sweep.json, if kept")


class SweepRecord(_Record):
    """The whole of sweep.json."""

    schema_version: str = Field(default="1.0", pattern=r"^1\.\d+$")
    tool: Tool
    created: str
    source: SweepSource
    target: str
    text: SweepText
    calibration: PathText | None = None
    environment: Environment
    points: list[SweepPoint] = Field(default_factory=list)

    @property
    def axes(self) -> dict[str, str]:
        """PASS.OPTION of every setting that a point has, and its short name: OPTION where that tells which is meant."""
        names = list(dict.fromkeys(name for point in self.points for name in point.settings))
        options = [name.partition(".")[2] for name in names]
        return {n: o if options.count(o) == 1 else n for n, o in zip(names, options, strict=True)}

    def dumps(self) -> str:
        """The text of sweep.json."""
        return self.model_dump_json(indent=2) + "\n"

    def mark_front(self) -> None:
        """Mark the points that no other one beats in bytes and divergence; of equal ones the first."""
        best = float("inf")
        measured = [p for p in self.points if p.bytes is not None and p.kld_mean is not None]
        for point in self.points:
            point.pareto = False
        for point in sorted(measured, key=lambda p: (p.bytes, p.kld_mean)):
            if point.kld_mean is not None and point.kld_mean < best:
                best, point.pareto = point.kld_mean, True


_FIGURES = (
    *("bytes", "bytes_ratio", "ppl", "ppl_ratio", "kld_mean", "kld_p99", "top1_agreement"),
    "tokens_left_out",
    *("prefill_tokens_per_second", "decode_tokens_per_second", "prefill_ratio", "decode_ratio", "compile_seconds"),
)


def sweep_csv(record: SweepRecord) -> str:
    """The text of sweep.csv: a row a point, a column an option of the grid; what was not measured is empty."""
    axes = record.axes
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["point", "recipe", *axes, "status", *_FIGURES, "pareto", "reason"])
    for point in record.points:
        values = [setting_text(point.settings.get(axis)) for axis in axes]
        figures = [setting_text(getattr(point, name)) for name in _FIGURES]
        writer.writerow(
            [point.name, point.base, *values, point.status, *figures, setting_text(point.pareto), point.reason]
        )
    return stream.getvalue()


def setting_text(value: Any) -> str:
    """A value as it is written in recipes, without quotes; nothing for None."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


def read_sweep(path: Path) -> SweepRecord:
    """Read sweep.json.

    Raises:
        ModelError: It is no JSON, or no sweep of schema version 1.
        OSError: It cannot be read.
    """
    try:
        return SweepRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ModelError(
            f"not a sweep of schema version 1: {first['msg']}",
            where=f"{path} at {place}" if place else str(path),
            todo="choose another folder, or remove this one",
        ) from error
