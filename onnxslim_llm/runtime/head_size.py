"""The size of a cache's heads where the graph leaves it open.

onnxruntime-genai's builder names every dimension of its caches but the number of heads; the size of a head is only in
the genai_config.json that it writes beside the model.
"""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["declared_head_size"]

_FILE = "genai_config.json"


def declared_head_size(model_file: str | Path) -> int | None:
    """`model.decoder.head_size` of the genai_config.json beside `model_file`, None if there is none that says it."""
    path = Path(model_file).parent / _FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        size = config["model"]["decoder"]["head_size"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return size if type(size) is int and size > 0 else None
