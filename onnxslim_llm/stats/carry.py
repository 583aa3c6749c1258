"""What one part of a model hands on to the next, on disk: memory does not grow with the number of samples."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxslim_llm.stats.calibration import Feeds

__all__ = ["Carry"]


@dataclass
class Carry:
    """Tensors between two segments, a file for each sample.

    Attributes:
        folder: Where they lie.
        samples: How many there are.
    """

    folder: Path
    samples: int

    def store(self, segment: int, sample: int, tensors: Feeds) -> None:
        """Keep what a segment hands on."""
        place = self.folder / str(segment)
        place.mkdir(parents=True, exist_ok=True)
        with (place / f"{sample}.npz").open("wb") as file:
            np.savez(file, **{f"t{i}": array for i, array in enumerate(tensors.values())})  # type: ignore[arg-type]

    def load(self, segment: int, sample: int, names: tuple[str, ...]) -> Feeds:
        """Read what a segment has handed on, by name, in the order in which it was stored."""
        if not names:
            return {}
        with np.load(self.folder / str(segment) / f"{sample}.npz") as stored:
            return {name: stored[f"t{i}"] for i, name in enumerate(names)}

    def complete(self, segment: int) -> bool:
        """Return whether a segment has handed on everything."""
        return all((self.folder / str(segment) / f"{i}.npz").is_file() for i in range(self.samples))

    def drop(self, segment: int) -> None:
        """Remove what a segment has handed on."""
        shutil.rmtree(self.folder / str(segment), ignore_errors=True)

    def clear(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)
