"""Store weights with many zeros as sparse initializers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx import SparseTensorProto

from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.ownership import is_overridable
from onnxslim_llm.ir.weights import ArrayWeight, SparseWeight, Weight, weight_of
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass

__all__ = ["StoreSparse"]

_TYPES = ("float32", "float16", "float64", "bfloat16")
_INDEX_BYTES = np.dtype(np.int64).itemsize
#: Sparse initializers lie in the .onnx file itself, which cannot be larger than 2 GiB: this much is left to them.
_INLINE_LIMIT = 1 << 30


@dataclass(frozen=True)
class StoreSparse(Pass):
    """Store initializers as their non-zero values and places (COO) where that takes fewer bytes.

    A place takes 8 bytes, so this pays above 67 % zeros in float32 and 80 % in float16. ONNX Runtime makes them dense
    when it loads the model: the file is smaller, memory and time stay as they are. onnx.checker accepts them, but its
    shape inference (`full_check`, onnx 1.23) knows no products with sparse tensors.

    Before:
        W: initializer, float[K, N] with D non-zero values
    After:
        W: sparse_initializer, values float[D], indices int64[D]

    Skips when:
        - that would not save at least `min_saving` of the dense bytes;
        - it has fewer than `min_elements` elements, or is of no float type;
        - it is a graph output, a graph input that the caller may replace, or shares its bytes with another initializer;
        - all sparse initializers together would exceed 1 GiB: they cannot lie in a file of their own.

    Attributes:
        min_saving: Share of the dense bytes that must be saved.
        min_elements: Smaller weights are left alone.
    """

    name: ClassVar[str] = "store_sparse"
    group: ClassVar[str] = "prune"

    min_saving: float = 0.0
    min_elements: int = 4096

    def __post_init__(self) -> None:
        if not 0 <= self.min_saving < 1:
            what = f"min_saving = {self.min_saving} is not possible"
            raise UsageError(what, where=self.name, todo="choose at least 0 and less than 1, such as 0.1")

    def apply(self, model: Model, context: Context) -> Change:
        """Look at every large weight once; the ones that were pruned before are computed now."""
        change = Change()
        outputs = graph_output_ids(model)
        constants = [c for c in model.constants() if isinstance(c, gs.Constant)]
        shared = Counter(weight_of(c).storage_key for c in constants)
        tensors, used = [], 0
        for constant in constants:
            weight = weight_of(constant)
            if weight.size < self.min_elements or isinstance(weight, SparseWeight) or str(weight.dtype) not in _TYPES:
                continue
            reason = _reason(constant, outputs, shared[weight.storage_key])
            if reason:
                change.skip(constant.name, reason)
                continue
            flat = weight.view().reshape(-1)
            places = np.flatnonzero(flat)
            size = places.size * (weight.dtype.itemsize + _INDEX_BYTES)
            entry = {
                "name": constant.name,
                "zeros": round(1 - places.size / weight.size, 4),
                "break_even": round(1 - weight.dtype.itemsize / (weight.dtype.itemsize + _INDEX_BYTES), 4),
                "dense_bytes": weight.nbytes,
                "sparse_bytes": size,
            }
            if size >= weight.nbytes * (1 - self.min_saving):
                zeros, needed = (f"{entry[key]:.1%}" for key in ("zeros", "break_even"))
                change.skip(constant.name, f"{zeros} zeros, and it pays above {needed}")
            elif used + size > _INLINE_LIMIT:
                change.skip(constant.name, "all sparse initializers together would exceed 1 GiB")
            else:
                used += size
                constant.values = _sparse(constant.name, weight, flat, places)
                change.sites.append(constant.name)
                tensors.append(entry)
            weight.release()
        if tensors:
            change.detail.update(tensors=tensors)
        return change


def _reason(constant: gs.Constant, outputs: set[int], sharing: int) -> str:
    if is_overridable(constant):
        return "it is a graph input, too: whoever runs the model may replace it"
    if id(constant) in outputs:
        return "it is a graph output, too"
    if sharing > 1:
        return f"{sharing} initializers share its bytes: sparse, each would have its own"
    return ""


def _sparse(name: str, weight: Weight, flat: np.ndarray[Any, Any], places: np.ndarray[Any, Any]) -> SparseWeight:
    proto = SparseTensorProto(dims=weight.shape)
    proto.values.name = name
    return SparseWeight(proto, ArrayWeight(flat[places]), ArrayWeight(places.astype(np.int64)))
