"""Caches of an artifact that has other ones than its source: fewer heads, or fewer layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxslim_llm.errors import ModelError
from onnxslim_llm.runtime.session import Array, Dim, Session
from onnxslim_llm.runtime.signature import find_decoder

__all__ = ["changed_caches", "fitted_feeds"]


def changed_caches(source: Session, artifact: Session) -> frozenset[str]:
    """Return the outputs of the source that cannot be compared, since the artifact has caches of other shapes."""
    ours, theirs = find_decoder(source)[0], find_decoder(artifact)[0]
    if ours is None or theirs is None or not theirs.caches:
        return frozenset()
    same = {(pair.past, pair.shape) for pair in ours.caches} == {(pair.past, pair.shape) for pair in theirs.caches}
    return frozenset() if same else frozenset(pair.present for pair in ours.caches)


def fitted_feeds(feeds: Mapping[str, Array], artifact: Session) -> dict[str, Array]:
    """Return the inputs for an artifact: the source's, with empty caches of the artifact's own shapes.

    Raises:
        ModelError: A cache that has another shape in the artifact is not empty.
    """
    fitted = {}
    for info in artifact.inputs:
        given = feeds[info.name]
        if not info.shape or _fits(given.shape, info.shape):  # ONNX Runtime shows an unknown rank as no axes
            fitted[info.name] = given
        elif given.size == 0 and given.ndim == len(info.shape):
            sizes = [d if isinstance(d, int) else n for d, n in zip(info.shape, given.shape, strict=True)]
            fitted[info.name] = np.zeros(sizes, given.dtype)
        else:
            what = f"the input is {list(given.shape)} for the source, the artifact wants {list(info.shape)}"
            raise ModelError(what, where=info.name, todo="give text, or inputs with empty caches")
    return fitted


def _fits(actual: Sequence[int], declared: Sequence[Dim]) -> bool:
    return len(actual) == len(declared) and all(
        n == size for n, size in zip(actual, declared, strict=True) if isinstance(size, int)
    )
