"""Calibration inputs: what a model is run on to learn what its weights are multiplied with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.errors import UsageError

__all__ = ["Calibration", "Feeds", "TensorCalibration", "TokenCalibration"]

Feeds = dict[str, NDArray[np.generic]]


class Calibration(Protocol):
    """Inputs that can be run through again and again, in the same order."""

    @property
    def digest(self) -> str:
        """SHA-256 of the data, as hexadecimal digits."""
        ...

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def feeds(self) -> Iterator[Feeds]:
        """Yield the inputs of every sample."""
        ...


class Feeder(Protocol):
    """What turns token ids [B, S] into a decoder's inputs: `runtime.decoder.DecoderRunner.arrays`."""

    def __call__(self, ids: NDArray[np.int64]) -> Feeds:
        """Return the inputs, caches empty."""
        ...


@dataclass(frozen=True)
class TokenCalibration:
    """Token ids for a decoder, in windows that each start on an empty cache.

    Attributes:
        tokens: [n] int64.
        window: Tokens of a sample; the last one may be shorter.
        feeder: Makes the inputs.
    """

    tokens: NDArray[np.int64]
    window: int
    feeder: Feeder

    @classmethod
    def checked(cls, tokens: NDArray[np.int64], window: int, vocab: int, feeder: Feeder) -> TokenCalibration:
        """Return calibration data for a model with `vocab` tokens.

        Raises:
            UsageError: No tokens, or ids outside of the vocabulary.
        """
        if not tokens.size:
            raise UsageError("the calibration data hold no tokens", where="--calib", todo="give a longer text")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab:
            wrong = low if low < 0 else high
            what = f"token id {wrong} lies outside of the model's vocabulary of {vocab}"
            raise UsageError(what, where="--calib", todo="use the tokenizer that the model was trained with")
        return cls(np.asarray(tokens, np.int64), window, feeder)

    @property
    def digest(self) -> str:
        """SHA-256 of tokens and window."""
        return hashlib.sha256(self.tokens.astype("<i8").tobytes() + f"window {self.window}".encode()).hexdigest()

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.window)

    def feeds(self) -> Iterator[Feeds]:
        """Yield the inputs of every window."""
        for start in range(0, len(self.tokens), self.window):
            yield self.feeder(self.tokens[None, start : start + self.window])


@dataclass(frozen=True)
class TensorCalibration:
    """Arrays by input name, for a model that is no decoder."""

    samples: tuple[Feeds, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of names and contents."""
        digest = hashlib.sha256()
        for sample in self.samples:
            for name in sorted(sample):
                array = np.ascontiguousarray(sample[name])
                digest.update(f"{name} {array.dtype} {array.shape}".encode())
                digest.update(array.tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.samples)

    def feeds(self) -> Iterator[Feeds]:
        """Yield the samples."""
        yield from self.samples
