"""Which tokens occur in the user's data, and which ones no text shows but a decoder needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.compiler.calibration import SELF, Calibrator
from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.runtime.sidefiles import read_json_object

__all__ = ["TextTokens"]

_TOKENIZER = "tokenizer.json"
_CONFIGS = ("config.json", "generation_config.json", "genai_config.json")
_SUFFIX = "_token_id"


@dataclass(frozen=True)
class TextTokens:
    """See `stats.token_source.TokenSource`.

    Attributes:
        calibrator: Knows where the data are.
    """

    calibrator: Calibrator

    def counts(self, name: str, size: int) -> NDArray[Any] | None:
        """Return how often each token occurs in all of the data, not only in what statistics are collected on."""
        data = self.calibrator.data
        if data is None or str(data) == SELF:
            return None
        found = self.calibrator.tokens(limit=None)
        if found is None:
            found = self.calibrator.array_input(name)
        if found.size and not 0 <= int(found.min()) <= int(found.max()) < size:
            wrong = int(found.max()) if int(found.min()) >= 0 else int(found.min())
            what = f"token id {wrong} lies outside of the model's vocabulary of {size}"
            raise UsageError(what, where="--calib", todo="use the tokenizer that the model was trained with")
        return np.bincount(found, minlength=size)

    def special(self) -> tuple[int, ...]:
        """Return ids of tokens that were added to the tokenizer, and of those that configurations name."""
        folder = self.calibrator.source.parent
        found: set[int] = set()
        for name in (_TOKENIZER, *_CONFIGS):
            try:
                content = read_json_object(folder / name)
            except ModelError:
                continue  # told where it is needed
            for entry in content.get("added_tokens") or ():
                found.update(_ids(entry.get("id") if isinstance(entry, dict) else None))
            for part in (content, content.get("model")):
                if isinstance(part, dict):
                    found.update(token for key, value in part.items() if key.endswith(_SUFFIX) for token in _ids(value))
        return tuple(sorted(found))


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]
