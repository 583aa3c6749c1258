"""How far the sentence vectors of an encoder moved: the counterpart of KL divergence for models without logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.runtime.session import Session

Array = NDArray[Any]


@dataclass(frozen=True)
class EncoderQuality:
    """Figures over sentences.

    Attributes:
        distance_mean, distance_p99: 1 - cosine between the vectors of source and artifact.
        mse: mean squared difference of the normalized vectors, a component.
        neighbour: share of sentences whose nearest other sentence stayed the same.
    """

    distance_mean: float
    distance_p99: float
    mse: float
    neighbour: float


def embed(session: Session, sentences: Sequence[dict[str, Array]]) -> Array:
    """Return unit vectors [sentences, width]: token vectors averaged, as sentence-transformers does it."""
    output = session.outputs[0].name
    rows = []
    for feeds in sentences:
        hidden = session.run(feeds)[output].astype(np.float64)[0]
        mask = feeds["attention_mask"][0].astype(np.float64)
        row = (hidden * mask[:, None]).sum(0) / mask.sum()
        rows.append(row / np.linalg.norm(row))
    return np.stack(rows)


def compare(source: Array, other: Array) -> EncoderQuality:
    """Compare unit vectors of the same sentences."""
    distance = 1 - (source * other).sum(axis=1)
    nearest = [(x @ x.T - 2 * np.eye(len(x))).argmax(axis=1) for x in (source, other)]
    return EncoderQuality(
        float(distance.mean()),
        float(np.quantile(distance, 0.99)),
        float(((source - other) ** 2).mean()),
        float((nearest[0] == nearest[1]).mean()),
    )
