"""Computing a mask at all the points that decide what it means; the argument is in `mask_meaning`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.ir.shapes import SymbolicValues
from onnxslim_llm.ir.shapes.dims import Dim, Expr
from onnxslim_llm.passes.fuse.masks.meaning import OPERATORS, Observation, Reading, Unclear, node_reason, read_mask
from onnxslim_llm.passes.fuse.masks.points import Axes, Breaks, Point, all_masks, break_points, paddings, points, solve
from onnxslim_llm.rewrite.probe import Probe, Unprobed, make_probe, size_at, symbols_of

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["Proven", "prove_mask"]

_RANK = 4
#: All 0/1 masks of so many keys are computed in one batch.
_ALL_MASKS = 4


@dataclass(frozen=True)
class Proven:
    """What a mask means.

    Attributes:
        mask: The mask.
        padding: The padding mask [B, T] that it reads; None if it reads none.
        nodes: Length of the program that computes it.
    """

    mask: gs.Tensor
    reading: Reading
    padding: gs.Variable | None
    nodes: int


def prove_mask(model: Model, values: SymbolicValues, axes: Axes, mask: gs.Tensor) -> Proven | Unclear:
    """Return what a mask [B or 1, H or 1, S or 1, T] means, or why it is not known.

    Args:
        model: The model.
        values: Its symbolic shapes, as it is now.
        axes: The sizes of the attention.
        mask: Booleans (true where visible), or floats that are added to the scores.
    """
    probe = make_probe(model, values, mask, OPERATORS, node_reason)
    if isinstance(probe, Unprobed):
        return Unclear(f"{probe.reason} at '{probe.culprit}'")
    summed = _summed_content(probe)
    if summed:
        return Unclear(f"it counts along the input at '{summed}'")
    if len(probe.inputs) > 1:
        return Unclear("it depends on " + " and ".join(f"'{t.name}'" for t in probe.inputs))
    padding = probe.inputs[0] if probe.inputs else None
    free = _free_sizes(values, axes, probe, padding)
    if isinstance(free, Unclear):
        return free
    observations = []
    for item in _observe(values, probe, axes, free, padding):
        if isinstance(item, Unclear):
            return item
        if item is not None:
            observations.append(item)
    if not observations:
        return Unclear("its sizes are not known")
    reading = read_mask(observations)
    if isinstance(reading, Unclear):
        return reading
    reading = replace(reading, window=_real_window(break_points(probe).stands_for, reading.window))
    return Proven(mask, reading, padding if reading.padding is not None else None, len(probe.nodes))


def _summed_content(probe: Probe) -> str:
    """Return the name of a running sum over the content of an input, or ""; sums of positions are as good as sizes."""
    tainted = {id(tensor) for tensor in probe.inputs}
    for node in probe.nodes:
        if probe.reads_content(node) and any(id(t) in tainted for t in node.inputs):
            if node.op == "CumSum":
                return str(node.outputs[0].name)
            tainted.update(id(t) for t in node.outputs)
    return ""


def _real_window(stands_for: dict[int, int], window: int) -> int:
    """Translate a window that was found with a small constant in the place of a large one."""
    for small, number in stands_for.items():
        if abs(window - small) <= 1:
            return number + window - small
    return window


def _free_sizes(
    values: SymbolicValues, axes: Axes, probe: Probe, padding: gs.Variable | None
) -> dict[str, Dim | None] | Unclear:
    """Return what the symbols are that the attention itself does not know, from the shapes that have to fit."""
    known = {name for dim in (axes.batch, axes.queries, axes.past, axes.keys) for name in symbols_of(dim)}
    free: dict[str, Dim | None] = {}
    pairs: list[tuple[Dim, Dim]] = []
    shape = values.shape_of(probe.tensor)
    if shape:
        pairs.append((shape[-1], axes.keys))
    wanted = set(probe.symbols)
    if padding is not None:
        declared = values.shape_of(padding)
        if declared is None or len(declared) != 2:
            return Unclear(f"'{padding.name}' is no padding mask [batch, keys]")
        pairs += [(declared[1], axes.keys), (declared[0], axes.batch)]
        wanted |= {name for dim in declared for name in symbols_of(dim)}
    for theirs, ours in pairs:
        if isinstance(theirs, Expr) and theirs != ours:
            names = symbols_of(theirs) - known
            if len(names) == 1 and len(theirs.terms) == 1:
                free.setdefault(names.pop(), ours)
    for name in sorted(wanted - known - set(free)):
        free[name] = None  # some tensor has it that is asked for another of its sizes
    return free


def _observe(
    values: SymbolicValues, probe: Probe, axes: Axes, free: dict[str, Dim | None], padding: gs.Variable | None
) -> Iterator[Observation | Unclear | None]:
    breaks = break_points(probe)
    entries = breaks.constants + list(breaks.stands_for)
    for point in points(axes, free, breaks):
        if padding is not None and not _fits(values, padding, point):
            yield Unclear(f"'{padding.name}' is no padding mask [batch, keys]")
            return
        if padding is None:
            yield _at(probe, breaks, point, None, None, True)
            continue
        for content, plain in paddings(padding, point.batch, point.keys, entries):
            yield _at(probe, breaks, point, padding, content, plain)
    if padding is not None:
        past = 2 if axes.past != 0 or axes.cross else 0
        whole = solve(axes, free, 2**_ALL_MASKS, _ALL_MASKS - past, past)
        if whole is not None and whole.batch == 2**_ALL_MASKS and whole.keys == _ALL_MASKS:
            yield _at(probe, breaks, whole, padding, all_masks(padding, whole.keys), False)


def _fits(values: SymbolicValues, padding: gs.Variable, point: Point) -> bool:
    shape = values.shape_of(padding) or ()
    return [size_at(dim, point.sizes) for dim in shape] == [point.batch, point.keys]


def _at(
    probe: Probe,
    breaks: Breaks,
    point: Point,
    padding: gs.Variable | None,
    content: NDArray[Any] | None,
    plain: bool,
) -> Observation | Unclear | None:
    """Return the mask at a point; None if it ends there: it was made for fewer keys."""
    feeds = {}
    if padding is not None and content is not None:
        feeds[padding.name] = content
    value = probe(point.sizes, feeds, {} if point.real else breaks.replaced)
    where = f"batch {point.batch}, {point.queries} queries, {point.keys} keys"
    ends = point.keys > min(breaks.tables, default=point.keys)
    if value is None or value.ndim > _RANK:
        if ends:
            return None
        return Unclear(f"it cannot be computed for {where}")
    heads = value.shape[-3] if value.ndim >= 3 else 1
    try:
        value = np.broadcast_to(value, (point.batch, heads, point.queries, point.keys))
    except ValueError:
        if ends:
            return None
        return Unclear(f"its shape {value.shape} does not fit {where}")
    scale = partial(_real_window, breaks.stands_for) if point.real and breaks.stands_for else None
    return Observation(point.batch, point.queries, point.keys, content, value, plain, scale)
