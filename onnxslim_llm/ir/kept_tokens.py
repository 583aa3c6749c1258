"""Which tokens of a vocabulary a model has kept: a note in its file, and token_map.json beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["KEPT_TOKENS", "LEFT_OUT_LOGIT", "KeptTokens"]

#: Key of the note in the model's metadata_props.
KEPT_TOKENS = "onnxslim_llm.kept_tokens"
#: Logit of tokens that are left out: its exponential is 0 in every float type, and float16 can hold it.
LEFT_OUT_LOGIT = -1e4


@dataclass(frozen=True)
class KeptTokens:
    """The tokens of a vocabulary that a model knows, in the order of their new ids.

    Attributes:
        vocabulary: Number of tokens before.
        ranges: First and last old id of each run of tokens that are kept, ascending.
        outputs: Whether the logits, too, are of these tokens only; the others' are `LEFT_OUT_LOGIT` or missing.
    """

    vocabulary: int
    ranges: tuple[tuple[int, int], ...]
    outputs: bool = True

    @classmethod
    def of(cls, vocabulary: int, ids: Iterable[int], outputs: bool = True) -> Self:
        """Return what is kept, from ascending old ids."""
        ranges: list[tuple[int, int]] = []
        for token in ids:
            if ranges and ranges[-1][1] == token - 1:
                ranges[-1] = (ranges[-1][0], int(token))
            else:
                ranges.append((int(token), int(token)))
        return cls(vocabulary, tuple(ranges), outputs)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Self | None:
        """Return what a model's metadata_props say; None if they say nothing, or nothing that can be read."""
        try:
            data = json.loads(metadata[KEPT_TOKENS])
            ranges = tuple((int(first), int(last)) for first, last in data["ranges"])
            return cls(int(data["vocabulary"]), ranges, bool(data["outputs"]))
        except (KeyError, ValueError, TypeError):
            return None

    def to_text(self) -> str:
        """Return the note."""
        return json.dumps({"vocabulary": self.vocabulary, "ranges": self.ranges, "outputs": self.outputs})

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        """Old ids by new ids, [V']."""
        return np.concatenate([np.arange(first, last + 1) for first, last in self.ranges]).astype(np.int64)

    @cached_property
    def new_ids(self) -> NDArray[np.int64]:
        """New ids by old ids, [V]; -1 for tokens that are left out."""
        found = np.full(self.vocabulary, -1, np.int64)
        found[self.ids] = np.arange(len(self.ids))
        return found

    def stand_ins(self, ids: NDArray[Any]) -> NDArray[Any]:
        """Return old ids of which those that are left out became some that are kept."""
        known = self.new_ids[ids] >= 0
        return np.where(known, ids, self.ids[ids % len(self.ids)]).astype(ids.dtype)

    def spread(self, logits: NDArray[Any]) -> NDArray[Any]:
        """Return logits [..., V'] of the kept tokens as [..., V]."""
        if logits.shape[-1] != len(self.ids):
            return logits
        result = np.full((*logits.shape[:-1], self.vocabulary), LEFT_OUT_LOGIT, logits.dtype)
        result[..., self.ids] = logits
        return result
