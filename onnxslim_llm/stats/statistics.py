"""Collected statistics on disk: one file for each tapped tensor, found by the weights that it is multiplied with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from onnxslim_llm.stats.moments import Moments
from onnxslim_llm.stats.taps import Tap
from onnxslim_llm.stats.transforms import Transform

__all__ = ["Collected", "Gain", "Statistics", "StoredMoments"]

_INDEX = "taps.json"


@dataclass(frozen=True)
class Collected:
    """The moments of one tapped tensor.

    Attributes:
        fit: Of the samples that methods fit weights to.
        held: Of the others, on which a method must show that it is better; the same as `fit` if there was one sample.
    """

    fit: Moments
    held: Moments


@dataclass(frozen=True)
class Gain:
    """What an error of a weight did to the model's answer; see `stats.gains`.

    Attributes:
        harm: Mean KL divergence in nats, or relative squared difference of an encoder's output.
        squared: The error: tr(E^T H E) a row of the input for a product's weight, the sum of its squares for a table.
        of_table: Which of both it is.
        looked_up: The same of the look-ups, where one weight is both a product's and a table.
    """

    harm: float
    squared: float
    of_table: bool = False
    looked_up: Gain | None = None

    @property
    def per_square(self) -> float:
        """The harm of a squared error of 1."""
        return max(self.harm, 0.0) / self.squared


@dataclass(frozen=True)
class StoredMoments:
    """Where the moments of one tapped tensor lie.

    Attributes:
        file: The .npz file.
        digest: Identifies its content: model, data and tensor.
        count: T, the rows that it was fitted to.
        size: K.
        transforms: What passes have done to the tensor since, in order.
    """

    file: Path
    digest: str
    count: int
    size: int
    transforms: tuple[Transform, ...] = ()

    def transformed(self, *transforms: Transform) -> StoredMoments:
        """Return the moments of the tensor after more changes."""
        if not transforms:
            return self
        text = " ".join([self.digest, *(step.digest for step in transforms)])
        digest = hashlib.sha256(text.encode()).hexdigest()
        return replace(self, digest=digest, size=transforms[-1].size, transforms=(*self.transforms, *transforms))

    def load(self) -> Collected:
        """Read the file: some 4 K^2 bytes twice, 8 K^2 in memory each."""
        with np.load(self.file) as stored:
            parts = {"fit": dict[str, np.ndarray](), "held": dict[str, np.ndarray]()}
            for name in stored.files:
                part, _, field_name = name.partition("_")
                parts[part][field_name] = stored[name]
        fit = self._transform(Moments.from_arrays(parts["fit"]))
        return Collected(fit, self._transform(Moments.from_arrays(parts["held"])) if parts["held"] else fit)

    def _transform(self, moments: Moments) -> Moments:
        for step in self.transforms:
            moments = step.apply(moments)
        return moments


@dataclass
class Statistics:
    """The moments of all tapped tensors of a model.

    Attributes:
        folder: Where they are stored.
        key: What they are statistics of: model, data and version.
        changes: What passes have done since: by weight, the weight whose input its own was, and how it differs.
        gains: By weight of the source, what its errors do to the model's answer; empty if that was not measured.
    """

    folder: Path
    key: str
    changes: Mapping[str, tuple[str, tuple[Transform, ...]]] = field(default_factory=dict, repr=False)
    gains: Mapping[str, Gain] = field(default_factory=dict, repr=False)
    _taps: dict[str, tuple[Tap, int]] = field(default_factory=dict, repr=False)  # with the rows seen

    def put(self, tap: Tap, fit: Moments, held: Moments) -> None:
        """Store the moments of one tap; whole or not at all."""
        path = self._file(len(self._taps))
        temporary = path.with_suffix(".part")
        arrays = {f"fit_{name}": array for name, array in fit.arrays().items()}
        if held.count:
            arrays |= {f"held_{name}": array for name, array in held.arrays().items()}
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, path)
        self._taps[tap.tensor] = (tap, fit.count)
        index = {"key": self.key, "taps": [{**asdict(t), "rows": rows} for t, rows in self._taps.values()]}
        temporary = self.folder / (_INDEX + ".part")
        temporary.write_text(json.dumps(index))
        os.replace(temporary, self.folder / _INDEX)

    def resume(self) -> None:
        """Take over what an earlier run with the same key has stored; anything else there is ignored."""
        try:
            index = json.loads((self.folder / _INDEX).read_text())
        except (OSError, ValueError):
            return
        if index.get("key") != self.key:
            return
        for number, entry in enumerate(index["taps"]):
            if not self._file(number).is_file():
                return
            rows = entry.pop("rows")
            self._taps[entry["tensor"]] = (Tap(**entry), rows)

    def has(self, tap: Tap) -> bool:
        """Return whether a tap is stored."""
        return tap.tensor in self._taps

    @property
    def taps(self) -> tuple[Tap, ...]:
        """All stored taps, in the order of collection."""
        return tuple(tap for tap, _ in self._taps.values())

    def of_tensor(self, tensor: str) -> StoredMoments | None:
        """Return the moments of a tapped tensor; None if it was not tapped."""
        for number, (tap, rows) in enumerate(self._taps.values()):
            if tap.tensor == tensor:
                digest = hashlib.sha256(f"{self.key} {tensor}".encode()).hexdigest()
                return StoredMoments(self._file(number), digest, rows, tap.size)
        return None

    def of_weight(self, weight: str) -> StoredMoments | None:
        """Return the moments of what a weight is multiplied with, by the initializer's name; None if unknown.

        A weight that is used twice has the moments of its first use.
        """
        if weight in self.changes:
            origin, transforms = self.changes[weight]
            stored = self._collected(origin)
            return None if stored is None else stored.transformed(*transforms)
        return self._collected(weight)

    def origin_of(self, weight: str) -> str:
        """Return the weight of the source model whose product a weight makes now: the one that has a gain."""
        return self.changes.get(weight, (weight, ()))[0]

    def changed(self, weight: str, *transforms: Transform, origin: str | None = None) -> Statistics:
        """Return the statistics after a pass has changed what a weight is multiplied with; nothing is computed.

        A pass puts the result into `Context.statistics`, and all passes after it see the changed input.

        Args:
            weight: Name of the initializer, which may be new.
            transforms: What was done to the input, in order.
            origin: The weight whose input, as it is now, was changed; default: `weight` itself.
        """
        root, before = self.changes.get(origin or weight, (origin or weight, ()))
        return replace(self, changes={**self.changes, weight: (root, (*before, *transforms))})

    def _collected(self, weight: str) -> StoredMoments | None:
        for tap in self.taps:
            if weight in tap.weights:
                return self.of_tensor(tap.tensor)
        return None

    def _file(self, number: int) -> Path:
        return self.folder / f"tap{number:05}.npz"
