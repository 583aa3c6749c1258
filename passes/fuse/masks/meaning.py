"""What a mask means, decided by computing it.

A mask [B, H, S, T] is a small program over sizes, ranges and the padding mask of the inputs. The question is whether
key j is visible to query i exactly if

    j <= P + i  (causal)  and  j > P + i - window  and  padding[b, j] says so,         P = T - S,

for some choice of the three. The argument that computing it at chosen points decides this:

- Only the operators in `OPERATORS` are allowed. They compare, combine truths, move data, and add: every integer on the
  way is a sum of positions, sizes and constants (a product has a factor that is one number: a size or a constant), and
  every truth is a comparison of two such sums, or an entry of the padding mask at such a position.
- So, for a fixed padding mask, whether (i, j) is visible depends only on the order of these sums. As functions of
  (i, j, S, P) they change their order where i + P - j and the like pass a constant of the program or zero, and nowhere
  else. Every such order occurs at the sizes S in 1..5, P in 0..4 and in the neighbourhood of the constants, see
  `passes.fuse.mask_points`.
- A constant table is read as a whole. Running sums (of positions, in exports that look for packed sequences) depend on
  no input.
- What the padding mask does is an entry-wise function; it is computed for 0, 1, other values, and the program's own
  constants with their neighbours, on all 0/1 masks of up to 4 keys and on random ones, rows of a batch being different.

Programs that look at anything else (position ids, the text, random numbers, control flow) are refused.

Rows that attend to nothing: under left padding the first rows of a causal mask see only padding. What they give is
never looked at, and exporters differ (uniform weights over all keys, over the past, NaN). Where the padding mask of
such a row's own token is 0, the row need not be equal; every other row must be.

Sums of masks: the lowest float plus itself is -inf. Both mean masked; where both occur, or only -inf, the new mask
says the lowest finite float, so that a row of padding stays free of NaN (or -inf, where such rows are made zeros).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

__all__ = ["MASKED", "OPERATORS", "Observation", "PaddingRule", "Reading", "Unclear", "node_reason", "read_mask"]

#: Scores are shifted by at least this where a mask hides a key: float32 weights vanish 104 below the largest score.
MASKED = -1e4

#: Comparisons, logic, sums, and whatever only moves data.
OPERATORS = frozenset(
    word
    for line in (
        "Less LessOrEqual Greater GreaterOrEqual Equal And Or Not Xor Where Trilu IsInf IsNaN",
        "Add Sub Neg Mul Min Max CumSum ReduceMin ReduceMax Range ConstantOfShape Cast CastLike",
        "Identity Reshape Flatten Squeeze Unsqueeze Transpose Expand Tile Slice Split Concat",
        "Gather GatherElements GatherND ScatterND ScatterElements",
    )
    for word in line.split()
)

PaddingRule = Literal["nonzero", "positive", "one"]
"""Which entries v of the padding mask leave a key visible: v != 0, v > 0, or v == 1."""


@dataclass(frozen=True)
class Observation:
    """A mask at one point.

    Attributes:
        batch, queries, keys: B, S, T.
        padding: The padding mask [B, T] that went in, or None.
        value: What came out, [B, H, S, T]: booleans (visible), or floats that are added to the scores.
        plain: Whether the padding mask is all ones (or absent).
        scale: What a window of the small constants is with the constants that were taken here; None if it is the same.
    """

    batch: int
    queries: int
    keys: int
    padding: NDArray[Any] | None
    value: NDArray[Any]
    plain: bool
    scale: Callable[[int], int] | None = None


@dataclass(frozen=True)
class Reading:
    """What a mask means.

    Attributes:
        causal: Keys after the query are hidden.
        window: Keys that are visible to a query, itself included; 0 for all.
        padding: What the padding mask does; None if nothing.
        low: What is added where the padding hides a key.
    """

    causal: bool
    window: int
    padding: PaddingRule | None
    low: float


@dataclass(frozen=True)
class Unclear:
    """Why no meaning was found, in one sentence."""

    reason: str


def node_reason(node: gs.Node) -> str:
    """Return why a node does not belong into a mask's program, or ""."""
    if node.op == "Mul" and not any(_is_float(t) or _is_single(t) for t in node.inputs):
        return "it multiplies positions"
    return ""


def _is_float(tensor: gs.Tensor) -> bool:
    return tensor.dtype is not None and np.issubdtype(np.dtype(tensor.dtype), np.floating)


def _is_single(tensor: gs.Tensor) -> bool:
    return tensor.shape is not None and all(dim == 1 for dim in tensor.shape)


def read_mask(observations: Sequence[Observation]) -> Reading | Unclear:
    """Return the meaning that all observations agree with.

    Args:
        observations: At least one of them plain.
    """
    seen = []
    for observation in observations:
        visible = _visible(observation.value)
        if visible is None:
            return Unclear("its values are neither 0 nor far below")
        seen.append(visible)
    causal, window = _band(observations, seen)
    low = _lowest(observations, seen)
    depends = any(o.padding is not None and not o.plain for o in observations)
    rules: tuple[PaddingRule | None, ...] = (None, "nonzero", "positive", "one") if depends else (None,)
    for rule in rules:
        reading = Reading(causal, window, rule, low)
        if all(_agrees(reading, o, v) for o, v in zip(observations, seen, strict=True)):
            return reading
    return Unclear("it is no causal, sliding or padding mask")


def _visible(value: NDArray[Any]) -> NDArray[Any] | None:
    if value.dtype == np.bool_:
        return value
    visible: NDArray[Any] = value == 0
    return visible if bool(np.all(visible | (value <= MASKED))) else None


def _distance(observation: Observation) -> NDArray[Any]:
    """Return how many keys before the query each key is: P + i - j, [S, T]."""
    rows = np.arange(observation.queries)[:, None] + (observation.keys - observation.queries)
    distance: NDArray[Any] = rows - np.arange(observation.keys)[None, :]
    return distance


def _band(observations: Sequence[Observation], seen: Sequence[NDArray[Any]]) -> tuple[bool, int]:
    causal, window = False, 0
    for observation, visible in zip(observations, seen, strict=True):
        if observation.plain and observation.scale is None:
            hidden = ~np.all(visible, axis=(0, 1))
            distance = _distance(observation)
            causal |= bool(np.any(hidden & (distance < 0)))
            far = distance[hidden & (distance > 0)]
            if far.size:
                window = min(window, int(far.min())) if window else int(far.min())
    return causal, window


def _lowest(observations: Sequence[Observation], seen: Sequence[NDArray[Any]]) -> float:
    """Return the one finite value that hides keys, or -inf for the lowest of the type."""
    lows: set[float] = set()
    for observation, visible in zip(observations, seen, strict=True):
        if observation.value.dtype != np.bool_:
            lows |= set(np.unique(observation.value[~visible]).tolist())
    return lows.pop() if len(lows) == 1 else -np.inf


def _agrees(reading: Reading, observation: Observation, visible: NDArray[Any]) -> bool:
    distance = _distance(observation)
    band = np.ones_like(distance, dtype=bool)
    if reading.causal:
        band &= distance >= 0
    if reading.window:
        band &= distance < (observation.scale(reading.window) if observation.scale else reading.window)
    expected = np.broadcast_to(band, (observation.batch, 1, *band.shape))
    if reading.padding is not None and observation.padding is not None:
        expected = expected & _shown(reading.padding, observation.padding)[:, None, None, :]
    equal = np.all(visible == expected, axis=(1, 3))  # [B, S]
    if observation.padding is not None and (reading.causal or reading.window):
        own = observation.padding[:, max(0, observation.keys - observation.queries) :]
        nothing = ~np.any(visible, axis=(1, 3)) | ~np.any(expected, axis=(1, 3))
        if own.shape == equal.shape:
            equal |= nothing & (own == 0)
    return bool(np.all(equal))


def _shown(rule: PaddingRule, padding: NDArray[Any]) -> NDArray[Any]:
    shown: dict[PaddingRule, NDArray[Any]] = {"nonzero": padding != 0, "positive": padding > 0, "one": padding == 1}
    return shown[rule]
