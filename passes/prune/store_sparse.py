"""Store weights with many zeros in fewer bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx import SparseTensorProto, TensorProto

from onnxslim_llm.custom_ops import available, ops, packed, sparse, sparse_kernels
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.ownership import is_overridable
from onnxslim_llm.ir.weights import ArrayWeight, SparseWeight, Weight, weight_of
from onnxslim_llm.passes.prune.storage.sparse_copy import SparseCopies
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass

__all__ = ["StoreSparse"]

_TYPES = ("float32", "float16", "float64", "bfloat16")
_INDEX_BYTES = np.dtype(np.int64).itemsize
_BITMAP_BITS = (4, 8)
#: Sparse initializers lie in the .onnx file itself, which cannot be larger than 2 GiB: this much is left to them.
_INLINE_LIMIT = 1 << 30


@dataclass(frozen=True)
class StoreSparse(Pass):
    """Store each weight in the form that takes the fewest bytes: dense, values with places, or values with a bitmap.

    Float weights become `sparse_initializer`s: their non-zero values, and a place of 8 bytes for each (COO), which pays
    above 67 % zeros in float32 and 80 % in float16. ONNX Runtime makes them dense when it loads the model: the file is
    smaller, memory and time stay as they are. onnx.checker accepts them, but its shape inference (`full_check`, onnx
    1.23) knows no products with sparse tensors.

    Weights of 4 or 8 bits in this package's own operators (`--target ort-cpu-ops`) keep a bit for each place and the
    codes that are not 0, which pays above 25 % zeros at 4 bits and 12.5 % at 8. The operator expands them when the
    session opens, or multiplies with them as they are where that is faster.

    Before:
        W: initializer, float[K, N] with D non-zero values
        Y = onnxslim_llm.ops.MatMulPacked <K, N, bits = 4> (X, B)
    After:
        W: sparse_initializer, values float[D], indices int64[D]
        Y = onnxslim_llm.ops.MatMulPacked <K, N, bits = 4> (X, B)        (bitmap and codes that are not 0)

    Skips when:
        - that would not save at least `min_saving` of the dense bytes;
        - it has fewer than `min_elements` elements, or is of no float type and no weight of our operators;
        - it is a graph output, a graph input that the caller may replace, or shares its bytes with another initializer;
        - rows of it are looked up, too;
        - it should be a weight of our operators, but is damaged;
        - all sparse initializers together would exceed 1 GiB: they cannot lie in a file of their own.

    Attributes:
        min_saving: Share of the dense bytes that must be saved.
        min_elements: Smaller weights are left alone.
    """

    name: ClassVar[str] = "store_sparse"
    group: ClassVar[str] = "prune"
    after_lowering: ClassVar[bool] = True

    min_saving: float = 0.0
    min_elements: int = 4096

    def __post_init__(self) -> None:
        if not 0 <= self.min_saving < 1:
            what = f"min_saving = {self.min_saving} is not possible"
            raise UsageError(what, where=self.name, todo="choose at least 0 and less than 1, such as 0.1")

    def apply(self, model: Model, context: Context) -> Change:
        """Look at every large weight once; the ones that passes have changed are computed now."""
        change = Change()
        tensors = [*self._store_places(model, change), *self._store_bitmaps(model, change)]
        if tensors:
            change.detail.update(tensors=tensors, break_even=_break_even())
        return change

    def _store_places(self, model: Model, change: Change) -> list[dict[str, Any]]:
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
            entry = _entry(constant.name, "coo", 1 - places.size / weight.size, weight.nbytes, size)
            if not self._pays(size, weight):
                change.skip(constant.name, _too_few(entry["zeros"], 1 - _coo_density(weight.dtype.itemsize)))
            elif used + size > _INLINE_LIMIT:
                change.skip(constant.name, "all sparse initializers together would exceed 1 GiB")
            else:
                used += size
                constant.values = _sparse(constant.name, weight, flat, places)
                change.sites.append(constant.name)
                tensors.append(entry)
            weight.release()
        return tensors

    def _store_bitmaps(self, model: Model, change: Change) -> list[dict[str, Any]]:
        outputs = graph_output_ids(model)
        multiplied, looked_up = _packed_constants(model)
        copies, chosen, tensors = SparseCopies(), [], []
        for constant in multiplied:
            weight = weight_of(constant)
            if weight.onnx_dtype != TensorProto.UINT8 or len(weight.shape) != 1:
                change.skip(constant.name, "it is no string of bytes, as packed weights are")
                continue
            data = weight.view()
            if sparse.is_sparse(data[: packed.HEADER_BYTES]):
                continue
            try:
                scheme = packed.parse(data)
            except ValueError as error:
                change.skip(constant.name, str(error))
                continue
            if scheme.rows * scheme.columns < self.min_elements:
                continue
            reason = _reason(constant, outputs, 1)
            if id(constant) in looked_up:
                reason = "rows of it are looked up, too"
            elif scheme.bits not in _BITMAP_BITS:
                reason = f"codes of {scheme.bits} bits have no sparse form"
            if reason:
                change.skip(constant.name, reason)
                continue
            found = sparse_kernels.make_sparse(data) if available() else sparse.make_sparse(data)
            values = sparse_kernels.stored_values(found) if available() else sparse.parse(found).values
            zeros = 1 - values / (scheme.rows * scheme.columns)
            if not self._pays(found.size, weight):
                change.skip(constant.name, _too_few(zeros, sparse.break_even(scheme.bits)))
                continue
            copies.add(found, weight, constant.name)
            chosen.append(constant)
            change.sites.append(constant.name)
            tensors.append(_entry(constant.name, f"bitmap, {scheme.bits} bits", zeros, weight.nbytes, found.size))
        for constant, weight in zip(chosen, copies.weights(), strict=True):
            constant.values = weight
        return tensors

    def _pays(self, size: int, dense: Weight) -> bool:
        return size < dense.nbytes * (1 - self.min_saving)


def _packed_constants(model: Model) -> tuple[list[gs.Constant], set[int]]:
    """Return the weights of our products, and the ids of those that are looked up."""
    multiplied: dict[int, gs.Constant] = {}
    looked_up: set[int] = set()
    for node in (node for graph in model.all_graphs() for node in graph.nodes if node.domain == ops.DOMAIN):
        place = {"MatMulPacked": 1, "GatherPacked": 0}.get(node.op)
        if place is None or len(node.inputs) <= place or not isinstance(node.inputs[place], gs.Constant):
            continue
        if place:
            multiplied[id(node.inputs[1])] = node.inputs[1]
        else:
            looked_up.add(id(node.inputs[0]))
    return list(multiplied.values()), looked_up


def _coo_density(itemsize: int) -> float:
    """The density below which values with places take fewer bytes than all values."""
    return itemsize / (itemsize + _INDEX_BYTES)


def _break_even() -> dict[str, float]:
    """Return the share of zeros above which each form is the smaller one."""
    found = {f"coo, {name}": 1 - _coo_density(size) for name, size in (("float32", 4), ("float16", 2))}
    found |= {f"bitmap, {bits} bits": sparse.break_even(bits) for bits in _BITMAP_BITS}
    return {form: round(share, 4) for form, share in found.items()}


def _entry(name: str, form: str, zeros: float, dense_bytes: int, sparse_bytes: int) -> dict[str, Any]:
    return {
        "name": name,
        "form": form,
        "zeros": round(zeros, 4),
        "dense_bytes": dense_bytes,
        "sparse_bytes": sparse_bytes,
    }


def _too_few(zeros: float, needed: float) -> str:
    return f"{zeros:.1%} zeros, and it pays above {needed:.1%}"


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
