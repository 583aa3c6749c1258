"""onnxruntime-genai: the artifact's folder as it is, with the genai_config.json that compile writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og


def run(model: Path, feeds: Mapping[str, Any], folder: Path, outputs: Sequence[str]) -> dict[str, Any]:
    """Return the logits of a prompt."""
    opened = og.Model(str(model.parent))
    ids = next(feeds[name] for name in ("input_ids", *feeds) if name in feeds and feeds[name].dtype.kind in "iu")
    parameters = og.GeneratorParams(opened)
    parameters.set_search_options(max_length=ids.shape[1] + 1, batch_size=ids.shape[0])
    generator = og.Generator(opened, parameters)
    generator.append_tokens(ids.astype(np.int32))
    return {name: np.array(generator.get_output(name)) for name in outputs}
