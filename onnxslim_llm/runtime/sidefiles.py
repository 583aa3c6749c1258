"""What the files beside a model say about generating with it: end tokens, context length."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxslim_llm.errors import ModelError

__all__ = ["SideFiles", "read_json_object"]

# tokenizer_config.json writes 1e30 for "unlimited"; no model has this context.
_UNLIMITED = 1 << 31


@dataclass(frozen=True)
class SideFiles:
    """Facts from generation_config.json, config.json, genai_config.json and tokenizer_config.json of one folder.

    Attributes:
        eos: ids that end a text; `eos_text`: the same as text where a file gives only that.
        context_length: largest number of tokens, None if no file says it.
    """

    eos: tuple[int, ...] = ()
    eos_text: str | None = None
    context_length: int | None = None

    @classmethod
    def of(cls, folder: str | Path) -> SideFiles:
        """Read the side files of `folder`; missing ones are fine.

        Raises:
            ModelError: a file is no JSON object.
        """
        folder = Path(folder)
        config = read_json_object(folder / "config.json")
        genai = read_json_object(folder / "genai_config.json").get("model", {})
        if not isinstance(genai, Mapping):
            raise ModelError("'model' is no object", where=str(folder / "genai_config.json"))
        generation = read_json_object(folder / "generation_config.json")
        tokenizer = read_json_object(folder / "tokenizer_config.json")
        eos: list[int] = []
        for source in (generation, config, genai):
            value = source.get("eos_token_id")
            for token in value if isinstance(value, list) else [value]:
                if isinstance(token, int) and token not in eos:
                    eos.append(token)
        text = tokenizer.get("eos_token")
        if isinstance(text, Mapping):
            text = text.get("content")
        lengths = (
            config.get("max_position_embeddings"),
            genai.get("context_length"),
            config.get("n_positions"),
            config.get("max_sequence_length"),
            config.get("seq_length"),
            tokenizer.get("model_max_length"),
        )
        length = next((int(n) for n in lengths if isinstance(n, int | float) and 0 < n < _UNLIMITED), None)
        return cls(tuple(eos), text if isinstance(text, str) else None, length)


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is no such file.

    Raises:
        ModelError: it is no JSON object, or cannot be read.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"not a readable JSON file: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise ModelError("the file holds no JSON object", where=str(path))
    return value
