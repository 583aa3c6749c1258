"""Operators that move elements, or say how many there are, without computing with them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from onnxslim_llm.gradients.backend import torch
from onnxslim_llm.gradients.rule import Call, Rule

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RULES"]


def _shape(call: Call) -> Tensor:
    sizes = list(call.input(0).shape)
    return torch.tensor(sizes[slice(call.attributes.get("start"), call.attributes.get("end"))], dtype=torch.int64)


def _reshape(call: Call) -> Tensor:
    x, sizes = call.input(0), call.numbers(1, "shape")
    assert sizes is not None
    if not call.attributes.get("allowzero"):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    if -1 in sizes and x.numel() == 0:  # torch refuses to guess
        known = math.prod(size for size in sizes if size != -1)
        sizes = [(0 if not known else x.numel() // known) if size == -1 else size for size in sizes]
    return x.reshape(sizes)


def _flatten(call: Call) -> Tensor:
    x = call.input(0)
    axis = call.attributes["axis"]
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _transpose(call: Call) -> Tensor:
    x = call.input(0)
    perm = call.attributes.get("perm")
    return x.permute(list(reversed(range(x.dim()))) if perm is None else list(perm))


def _squeeze(call: Call) -> Tensor:
    x, axes = call.input(0), call.numbers(1, "axes")
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _unsqueeze(call: Call) -> Tensor:
    x, axes = call.input(0), call.numbers(1, "axes")
    assert axes is not None
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _split(call: Call) -> list[Tensor]:
    x, axis = call.input(0), call.attributes["axis"]
    sizes = call.numbers(1, "split")
    if sizes is None:
        whole = x.shape[axis]
        step = -(-whole // call.outputs)
        sizes = [min(step, whole - step * i) for i in range(call.outputs)]
    return list(torch.split(x, sizes, axis))


def _slice(call: Call) -> Tensor:
    x = call.input(0)
    starts, ends = call.numbers(1, "starts"), call.numbers(2, "ends")
    assert starts is not None
    assert ends is not None
    axes = call.numbers(3, "axes") or list(range(len(starts)))
    steps = call.numbers(4) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        picked = range(*slice(start, end if step > 0 or end >= -x.shape[axis] else None, step).indices(x.shape[axis]))
        if step > 0:
            x = x[(slice(None),) * (axis % x.dim()) + (slice(picked.start, max(picked.stop, picked.start), step),)]
        else:
            x = x.index_select(axis, torch.tensor(list(picked), dtype=torch.int64))
    return x


def _gather(call: Call) -> Tensor:
    x, indices, axis = call.input(0), call.input(1), call.attributes["axis"]
    axis %= x.dim()
    wrapped = torch.where(indices < 0, indices + x.shape[axis], indices).reshape(-1).long()
    found = x.index_select(axis, wrapped)
    return found.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def _gather_elements(call: Call) -> Tensor:
    x, indices, axis = call.input(0), call.input(1).long(), call.attributes["axis"]
    wrapped = torch.where(indices < 0, indices + x.shape[axis], indices)
    # torch.gather wants no other axis of the indices to be longer, and neither does ONNX.
    return torch.gather(x, axis, wrapped)


def _gather_nd(call: Call) -> Tensor:
    x, indices, batch = call.input(0), call.input(1).long(), call.attributes["batch_dims"]
    depth = indices.shape[-1]
    lead = torch.meshgrid(*(torch.arange(n) for n in indices.shape[:batch]), indexing="ij") if batch else ()
    rank = indices.dim() - 1
    shaped = [grid.reshape(*grid.shape, *(1,) * (rank - batch)) for grid in lead]
    return x[(*shaped, *(indices[..., i] for i in range(depth)))]


def _scatter_elements(call: Call) -> Tensor:
    x, indices, updates = call.input(0), call.input(1).long(), call.input(2)
    axis, how = call.attributes["axis"], call.attributes.get("reduction", "none")
    wrapped = torch.where(indices < 0, indices + x.shape[axis], indices)
    if how == "none":
        return x.scatter(axis, wrapped, updates)
    return x.scatter_reduce(axis, wrapped, updates, {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}[how])


def _scatter_nd(call: Call) -> Tensor:
    x, indices, updates = call.input(0), call.input(1).long(), call.input(2)
    place = tuple(indices[..., i] for i in range(indices.shape[-1]))
    if call.attributes.get("reduction", "none") not in ("none", "add"):
        raise NotImplementedError(f"reduction = {call.attributes['reduction']}")
    return x.index_put(place, updates, accumulate=call.attributes.get("reduction", "none") == "add")


def _expand(call: Call) -> Tensor:
    sizes = call.numbers(1)
    assert sizes is not None
    x = call.input(0)
    return x.expand(torch.broadcast_shapes(tuple(x.shape), tuple(sizes)))


def _tile(call: Call) -> Tensor:
    repeats = call.numbers(1)
    assert repeats is not None
    return call.input(0).repeat(repeats)


def _pad(call: Call) -> Tensor:
    x, pads = call.input(0), call.numbers(1, "pads")
    assert pads is not None
    axes = call.numbers(3) or list(range(x.dim()))
    value = call.optional(2)
    flat = [0] * (2 * x.dim())
    for i, axis in enumerate(axes):
        at = 2 * (x.dim() - 1 - axis % x.dim())
        flat[at], flat[at + 1] = pads[i], pads[i + len(axes)]
    mode = call.attributes["mode"]
    if mode != "constant":
        raise NotImplementedError(f"mode = {mode}")
    fill = call.attributes.get("value", 0.0) if value is None else value.item()
    return torch.nn.functional.pad(x, flat, value=fill)


def _trilu(call: Call) -> Tensor:
    offset = call.optional(1)
    k = 0 if offset is None else int(offset.item())
    return torch.triu(call.input(0), k) if call.attributes["upper"] else torch.tril(call.input(0), k)


RULES: dict[str, Rule] = {
    "Concat": lambda call: torch.cat(call.given(), call.attributes["axis"]),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Pad": _pad,
    "Reshape": _reshape,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Size": lambda call: torch.tensor(call.input(0).numel(), dtype=torch.int64),
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
