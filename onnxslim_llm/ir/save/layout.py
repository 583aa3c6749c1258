"""Where each weight will lie in the external data file; decided before a byte is written."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from onnx import TensorProto

from onnxslim_llm.ir.walk import all_initializers
from onnxslim_llm.ir.weights import dtypes, weight_of
from onnxslim_llm.ir.weights.concat import ConcatWeight
from onnxslim_llm.ir.weights.jobs import DerivedWeight
from onnxslim_llm.ir.weights.sparse import SparseWeight
from onnxslim_llm.ir.weights.stored import MappedWeight
from onnxslim_llm.ir.weights.views import AliasWeight, ViewWeight
from onnxslim_llm.ir.weights.weight import Weight

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["EXTERNAL_TENSOR_BYTES", "EXTERNAL_TOTAL_BYTES", "Layout", "Region", "plan_layout", "work_identity"]

EXTERNAL_TENSOR_BYTES = 1 << 10
"""Tensors of fewer bytes stay inside the model file."""

EXTERNAL_TOTAL_BYTES = 1 << 20
"""With fewer bytes of weights in all, the model is one file (unless initializers share bytes)."""

_PAGE_ALIGNED_FROM = 64 << 10
_PAGE, _LINE = 4096, 64  # bytes: what a memory map starts at; a cache line, and the widest vector load


@dataclass(frozen=True)
class Region:
    """Bytes [offset, offset + nbytes) of the data file.

    Attributes:
        name: The first initializer that is stored there.
        weight: Whose raw bytes they are.
    """

    offset: int
    nbytes: int
    name: str
    weight: Weight


@dataclass
class Layout:
    """Regions of the data file, by the storage key of what they hold.

    Attributes:
        regions: In the order of the file.
        size: Bytes of the data file; 0 if all weights are inside the model file.
        small: Outputs of jobs that stay inside the model file, by storage key.
    """

    regions: dict[Hashable, Region] = field(default_factory=dict)
    size: int = 0
    small: dict[Hashable, DerivedWeight] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 over names, types, shapes and places. Equal models have equal layouts, on every machine."""
        digest = hashlib.sha256()
        for region in self.regions.values():
            weight = region.weight
            digest.update(
                f"{region.offset} {region.nbytes} {weight.onnx_dtype} {weight.shape} {region.name}\n".encode()
            )
        return digest.hexdigest()


def plan_layout(models: Model | Sequence[Model], external: Literal["auto"] | bool = "auto") -> Layout:
    """Place the weights: in the order of the initializers, shared bytes once, large regions at pages.

    Args:
        models: What to save: one model, or several that have one data file between them.
        external: True: all tensors of EXTERNAL_TENSOR_BYTES or more go into the data file. False: none. "auto": as with
            True if they are EXTERNAL_TOTAL_BYTES or more in all, or if any two of them share their bytes; else none.
    """
    if external is False:
        return Layout()
    wanted: dict[Hashable, tuple[str, Weight]] = {}
    shared = False
    small: dict[Hashable, DerivedWeight] = {}
    several = models if isinstance(models, Sequence) else [models]
    for constant in (tensor for model in several for tensor in all_initializers(model.graph)):
        weight = weight_of(constant)
        if not _may_be_external(weight):
            if isinstance(weight.storage, DerivedWeight):
                small[weight.storage_key] = weight.storage
            continue
        shared |= weight.storage_key in wanted
        wanted.setdefault(weight.storage_key, (constant.name, weight.storage))
    total = sum(weight.nbytes for _, weight in wanted.values())
    if external == "auto" and not shared and total < EXTERNAL_TOTAL_BYTES:
        return Layout()
    layout = Layout(small=small)
    for key, (name, weight) in wanted.items():
        alignment = _PAGE if weight.nbytes >= _PAGE_ALIGNED_FROM else _LINE
        offset = -(-layout.size // alignment) * alignment
        layout.regions[key] = Region(offset, weight.nbytes, name, weight)
        layout.size = offset + weight.nbytes
    return layout


def work_identity(weight: Weight) -> str:
    """Return a text that is equal in another run only if the raw bytes are the same; in-memory content is hashed."""
    if isinstance(weight, MappedWeight):
        return f"file {weight.file.path} {weight.file.identity} {weight.offset} {weight.nbytes}"
    if isinstance(weight, DerivedWeight):
        job = weight.job
        inputs = "; ".join(work_identity(source) for source in job.inputs)
        kind = f"{type(job).__module__}.{type(job).__qualname__}"
        return f"job {kind} {job.fingerprint} {job.outputs} output {weight.index} of ({inputs})"
    if isinstance(weight, ViewWeight):
        return f"{weight.op} of ({work_identity(weight.base)})"
    if isinstance(weight, AliasWeight):
        return work_identity(weight.base)
    if isinstance(weight, ConcatWeight):
        parts = "; ".join(f"{part.shape} {work_identity(part)}" for part in weight.parts)
        return f"axis {weight.axis} of ({parts})"
    return weight.digest().hex()


def _may_be_external(weight: Weight) -> bool:
    if isinstance(weight, SparseWeight) or weight.onnx_dtype == TensorProto.STRING:
        return False
    return dtypes.numpy_dtype(weight.onnx_dtype) is not None and weight.nbytes >= EXTERNAL_TENSOR_BYTES
