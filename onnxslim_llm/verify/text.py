"""Reading the text that a model is measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from onnxslim_llm.errors import ResourceError, UsageError
from onnxslim_llm.runtime.session import Array

__all__ = ["Encoder", "read_tokens"]

_CHARS_PER_TOKEN = 16  # read ahead generously; a token is about 4 characters of text


class Encoder(Protocol):
    """What `evaluate` needs of a tokenizer; `runtime.tokenizer.TextTokenizer` has it."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        ...


def read_tokens(path: Path, tokenizer: Encoder, max_tokens: int | None) -> Array:
    """The first `max_tokens` tokens of a text file, [n] int64.

    Raises:
        UsageError: there is no such file, it is no UTF-8 text, or it has fewer than two tokens.
        ResourceError: the file cannot be read.
    """
    limit = None if max_tokens is None else max_tokens * _CHARS_PER_TOKEN
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(limit)
            ids = tokenizer.encode(text)
            while (
                limit is not None and max_tokens is not None and len(ids) <= max_tokens and (more := file.read(limit))
            ):
                text += more
                ids = tokenizer.encode(text)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UsageError("there is no such text file", where=str(path), todo="check the path") from error
    except OSError as error:
        raise ResourceError(f"the text cannot be read: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise UsageError("the text is not UTF-8", where=str(path), todo="save it as a UTF-8 text file") from error
    if len(ids[:max_tokens]) < 2:
        raise UsageError(f"the text has {len(ids[:max_tokens])} tokens; at least 2 are needed", where=str(path))
    return np.asarray(ids[:max_tokens], np.int64)
