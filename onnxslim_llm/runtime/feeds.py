"""Random inputs that fit the inputs of any model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx

from onnxslim_llm.errors import ModelError
from onnxslim_llm.runtime.session import Array, Dim, TensorInfo

__all__ = ["index_bounds", "random_feeds", "sizes_of"]

_BATCH_WORD = re.compile(r"batch|^b$", re.IGNORECASE)
_FIRST_BATCH_WORD = re.compile(r"^n$", re.IGNORECASE)  # in front it is a batch, elsewhere just a number
_MASK_WORD = re.compile(r"mask", re.IGNORECASE)
_POSITION_WORD = re.compile(r"position", re.IGNORECASE)
_ZERO_WORD = re.compile(r"token_type|segment", re.IGNORECASE)

# Without a table that says more, 0 and 1 are the integers most likely to be valid indices.
_SAFE_INDEX = 2

# Ops that hand integers on unchanged, on the way from an input to the Gather that looks them up.
_CARRIERS = frozenset({"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Expand"})
_TABLE_CARRIERS = frozenset({"Cast", "Identity", "DequantizeLinear"})


def sizes_of(inputs: Iterable[TensorInfo], *, batch: int, length: int) -> dict[str, int]:
    """A size for every named dimension: `batch` where the name says so, else `length`.

    Sums such as "past_length + sequence_length" get no size of their own: they follow from their parts.
    """
    sizes: dict[str, int] = {}
    for info in inputs:
        for axis, dim in enumerate(info.shape or ()):
            for name in _terms(dim) if isinstance(dim, str) else ():
                if not name.isdigit() and name not in sizes:
                    is_batch = _BATCH_WORD.search(name) or (axis == 0 and _FIRST_BATCH_WORD.search(name))
                    sizes[name] = batch if is_batch else length
    return sizes


def random_feeds(
    inputs: Iterable[TensorInfo],
    sizes: Mapping[str, int],
    rng: np.random.Generator,
    *,
    batch: int = 1,
    length: int = 8,
    bounds: Mapping[str, int] | None = None,
) -> dict[str, Array]:
    """Arrays for all `inputs`: masks of ones, positions in order, indices inside their table, normal numbers.

    Args:
        inputs: what the model takes.
        sizes: of the named dimensions, as `sizes_of` gives them; the same name has the same size everywhere.
        rng: source of randomness.
        batch: size of an unnamed first dimension.
        length: size of other unnamed dimensions.
        bounds: number of rows that an index input may choose from, by input name (`index_bounds`).

    Raises:
        ModelError: an input is of a type that cannot be generated; it is named.
    """
    feeds: dict[str, Array] = {}
    for info in inputs:
        shape = [_size(d, sizes, batch if axis == 0 else length) for axis, d in enumerate(info.shape or ())]
        feeds[info.name] = _array(info, shape, rng, (bounds or {}).get(info.name))
    return feeds


def _terms(dim: str) -> list[str]:
    return [term for term in re.split(r"[\s+]+", dim.strip()) if term]


def _size(dim: Dim, sizes: Mapping[str, int], default: int) -> int:
    if isinstance(dim, int):
        return dim
    if dim is None:
        return default
    return sum(int(term) if term.isdigit() else sizes.get(term, default) for term in _terms(dim))


def _array(info: TensorInfo, shape: list[int], rng: np.random.Generator, bound: int | None) -> Array:
    dtype = info.dtype
    if dtype is None or dtype.kind in "OUS":
        raise ModelError(
            f"no values can be made up for an input of type {info.kind}",
            where=info.name,
            todo="give real inputs: --calib FILE.npz with one array per input name",
        )
    if _MASK_WORD.search(info.name):
        return np.ones(shape, dtype)
    if _ZERO_WORD.search(info.name):
        return np.zeros(shape, dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(dtype)
    if dtype.kind in "iu":
        if _POSITION_WORD.search(info.name) and shape:
            row = np.arange(shape[-1]) % (bound or max(shape[-1], 1))
            return np.broadcast_to(row, shape).astype(dtype)
        if bound is None and dtype.itemsize == 1:  # pixels and quantized activations
            limits = np.iinfo(dtype)
            return rng.integers(limits.min, limits.max, shape, endpoint=True).astype(dtype)
        return rng.integers(0, bound or _SAFE_INDEX, shape).astype(dtype)
    normal: Array = rng.standard_normal(shape, dtype=np.float32)
    return normal.astype(dtype)


def index_bounds(model: onnx.ModelProto) -> dict[str, int]:
    """Rows of the smallest table that each integer input looks up with Gather in the top graph.

    Only dimensions of initializers are read, so the weights may be left out of the proto.
    """
    graph = model.graph
    rows: dict[str, tuple[int, ...]] = {t.name: tuple(t.dims) for t in graph.initializer}
    origin = {value.name: value.name for value in graph.input}
    table = {name: name for name in rows}
    bounds: dict[str, int] = {}
    for node in graph.node:
        if not node.input or not node.output:
            continue
        first = node.input[0]
        if node.op_type in _TABLE_CARRIERS and first in table:
            table[node.output[0]] = table[first]
        if node.op_type in _CARRIERS and first in origin:
            origin[node.output[0]] = origin[first]
        if node.op_type in ("Gather", "GatherBlockQuantized", "GatherPacked") and len(node.input) > 1:
            _bound(node, table, rows, origin, bounds)
    return bounds


def _bound(
    node: onnx.NodeProto,
    table: Mapping[str, str],
    rows: Mapping[str, tuple[int, ...]],
    origin: Mapping[str, str],
    bounds: dict[str, int],
) -> None:
    source, looked_up = origin.get(node.input[1]), table.get(node.input[0])
    if source is None or looked_up is None:
        return
    attributes: dict[str, Any] = {a.name: a.i for a in node.attribute}
    axis = attributes.get("axis", attributes.get("gather_axis", 0))
    dims = (attributes.get("N", 0),) if node.op_type == "GatherPacked" else rows[looked_up]
    if -len(dims) <= axis < len(dims):
        bounds[source] = min(bounds.get(source, dims[axis]), dims[axis])
