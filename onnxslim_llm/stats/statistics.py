"""Collected statistics on disk: one file for each tapped tensor, found by the weights that it is multiplied with."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from onnxslim_llm.stats.moments import Moments
from onnxslim_llm.stats.taps import Tap

__all__ = ["Statistics"]

_INDEX = "taps.json"


@dataclass
class Statistics:
    """The moments of all tapped tensors of a model.

    Attributes:
        folder: Where they are stored.
        key: What they are statistics of: model, data and version.
        rows: T, rows seen by a tap that sees every token.
    """

    folder: Path
    key: str
    _taps: dict[str, Tap] = field(default_factory=dict, repr=False)

    def put(self, tap: Tap, moments: Moments) -> None:
        """Store the moments of one tap; whole or not at all."""
        path = self._file(len(self._taps))
        temporary = path.with_suffix(".part")
        with temporary.open("wb") as file:
            np.savez(file, **moments.arrays())  # type: ignore[arg-type]
        os.replace(temporary, path)
        self._taps[tap.tensor] = tap
        index = {"key": self.key, "taps": [asdict(t) for t in self._taps.values()]}
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
            tap = Tap(**entry)
            self._taps[tap.tensor] = tap

    def has(self, tap: Tap) -> bool:
        """Return whether a tap is stored."""
        return tap.tensor in self._taps

    @property
    def taps(self) -> tuple[Tap, ...]:
        """All stored taps, in the order of collection."""
        return tuple(self._taps.values())

    def of_tensor(self, tensor: str) -> Moments | None:
        """Return the moments of a tapped tensor; None if it was not tapped."""
        for number, name in enumerate(self._taps):
            if name == tensor:
                with np.load(self._file(number)) as stored:
                    return Moments.from_arrays(dict(stored))
        return None

    def of_weight(self, weight: str) -> Moments | None:
        """Return the moments of what a weight is multiplied with, by the initializer's name; None if unknown.

        A weight that is used twice has the moments of its first use.
        """
        for tap in self._taps.values():
            if weight in tap.weights:
                return self.of_tensor(tap.tensor)
        return None

    def _file(self, number: int) -> Path:
        return self.folder / f"tap{number:05}.npz"
