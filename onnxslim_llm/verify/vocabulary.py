"""Comparing models of which one has fewer tokens: on the tokens that both know, renormalised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from onnxslim_llm.ir.kept_tokens import KeptTokens
from onnxslim_llm.runtime.session import Array
from onnxslim_llm.verify.predictor import Predictor

__all__ = ["CommonTokens"]


@dataclass(frozen=True)
class CommonTokens:
    """The tokens that all of some models know.

    Attributes:
        kept: Of the one that knows fewest; None if all know the whole vocabulary.
    """

    kept: KeptTokens | None

    @classmethod
    def of(cls, *models: Predictor | None) -> Self:
        """Return those of open models; of several that have left out tokens, those of the last."""
        found = [getattr(model.signature, "kept", None) for model in models if model is not None]
        return cls(next((kept for kept in reversed(found) if kept is not None), None))

    def fed(self, ids: Array) -> Array:
        """Return made-up ids of which those that are left out became some that are kept."""
        return ids if self.kept is None else self.kept.stand_ins(ids)

    def logits(self, logits: Array) -> Array:
        """Return the logits [..., V] of these tokens, [..., V']."""
        if self.kept is None or not self.kept.outputs:
            return logits
        result: Array = logits[..., self.kept.ids]
        return result

    def without_others(self, logits: Array) -> Array:
        """Return float logits [..., V] in which no other token is ever the likeliest."""
        if self.kept is None or not self.kept.outputs:
            return logits
        return np.where(self.kept.new_ids >= 0, logits, -np.inf)

    def predicted(self, targets: Array, *logits: Array | None) -> tuple[Array, list[Array | None]]:
        """Return targets [n] and logits [n, V] in new ids, without targets that are left out."""
        if self.kept is None or not self.kept.outputs:
            return targets, list(logits)
        new = self.kept.new_ids[targets]
        known = new >= 0
        return new[known], [None if each is None else self.logits(each[known]) for each in logits]
