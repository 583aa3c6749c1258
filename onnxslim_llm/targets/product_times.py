"""How long products with few-bit weights take on a machine: what passes ask for, and the table that they get."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, astuple, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol

from onnxslim_llm.errors import UsageError

__all__ = ["ProductForm", "ProductTimer", "TimeTable", "read_times"]

ReadAs = Literal["product", "look_up", "tied"]
FloatType = Literal["float32", "float16"]

_KEY = "product_times"
_DIGITS = 4


@dataclass(frozen=True, order=True)
class ProductForm:
    """All that the time of a product, or of a look-up, depends on.

    Attributes:
        rows: K of the weight [K, N].
        columns: N.
        bits, block, symmetric, scale_type: As in `WeightScheme`.
        computes_in: Element type of the activations.
        read_as: By a "product" with one row, by the "look_up" of one row of the table, or by one of both, "tied".
    """

    rows: int
    columns: int
    bits: int
    block: int
    symmetric: bool
    scale_type: FloatType
    computes_in: FloatType
    read_as: ReadAs = "product"


@dataclass(frozen=True)
class TimeTable:
    """Measured times.

    Attributes:
        target: Name of the target whose operators were timed.
        processor: Where.
        runtime: In which version.
        threads: With so many.
        spread: How much the machine did besides: the middle run by the fastest one, median over all forms.
        seconds: Time of one token.
    """

    target: str
    processor: str
    runtime: str
    threads: int
    spread: float = 1.0
    seconds: Mapping[ProductForm, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it for the manifest; times in milliseconds."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("seconds", "spread")}
        rows = [[*astuple(form), _rounded(1e3 * time)] for form, time in sorted(self.seconds.items())]
        columns = [*(f.name for f in fields(ProductForm)), "milliseconds"]
        return {**named, "spread": round(self.spread, 3), "columns": columns, "rows": rows}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TimeTable:
        """Return the table that `to_json` made.

        Raises:
            ValueError, TypeError, KeyError: It did not make that.
        """
        columns = [str(name) for name in data["columns"]]
        seconds = {}
        for row in data["rows"]:
            entry = dict(zip(columns, row, strict=True))
            milliseconds = float(entry.pop("milliseconds"))
            if not (math.isfinite(milliseconds) and milliseconds > 0):
                raise ValueError(f"{milliseconds} milliseconds")
            seconds[ProductForm(**entry)] = milliseconds / 1e3
        text = {name: str(data[name]) for name in ("target", "processor", "runtime")}
        return cls(**text, threads=int(data["threads"]), spread=float(data["spread"]), seconds=seconds)

    def need(self, forms: Collection[ProductForm], where: str) -> None:
        """Check that the table has these forms.

        Raises:
            UsageError: One is missing.
        """
        missing = next((form for form in sorted(forms) if form not in self.seconds), None)
        if missing is not None:
            what = ", ".join(f"{name}={value}" for name, value in asdict(missing).items())
            todo = "give times of a compile of the same model, target and options, or leave the file away"
            raise UsageError(f"there is no time for {what}", where=where, todo=todo)


class ProductTimer(Protocol):
    """What a pass may ask about the machine that the model is compiled on."""

    def measure(self, forms: Collection[ProductForm], elements: int) -> TimeTable:
        """Return the times of the forms, measured now or before.

        Args:
            forms: What to measure.
            elements: Of all weights that are read for a token: they say which caches they stay in.

        Raises:
            UsageError: The target's runtime does not run here, or its times here say nothing about the device.
        """


def read_times(path: Path) -> TimeTable:
    """Return the table of measured times in a manifest, or in a file that holds nothing else.

    Raises:
        UsageError: There is none.
    """
    todo = "give the manifest.json of a compile with target_ms"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"the times cannot be read: {error}", where=str(path), todo=todo) from error
    try:
        found = data if "rows" in data else next(p["detail"][_KEY] for p in data["passes"] if _KEY in p["detail"])
        return TimeTable.from_json(found)
    except (ValueError, TypeError, KeyError, StopIteration) as error:
        what = f"the file holds no times of products: {type(error).__name__}: {error}".rstrip(": ")
        raise UsageError(what, where=str(path), todo=todo) from error


def _rounded(milliseconds: float) -> float:
    return float(f"{milliseconds:.{_DIGITS}g}")
