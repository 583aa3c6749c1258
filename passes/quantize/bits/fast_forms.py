"""Forms of weights that a runtime has fast kernels for, where the limit leaves room for them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from onnxslim_llm.passes.quantize.bits.limits import Limits
from onnxslim_llm.passes.quantize.bits.mixed_precision import Demand
from onnxslim_llm.passes.quantize.bits.stored_size import Storage, stored_bytes

__all__ = ["fast_forms"]


def fast_forms(demands: Sequence[Demand], fast_bits: Collection[int], limits: Limits, storage: Storage) -> list[Demand]:
    """Return the demands with forms of the fast widths only; as they are if those do not fit into the limit.

    A weight in a form without a kernel can cost more time than all the others save: with 2 bits for some weights the
    sample model decoded at less than half of its speed with 4 and 8.

    Args:
        demands: The weights; one that has no other form keeps what it has.
        fast_bits: The widths; none: the runtime is fast with all.
        limits: Of the bits.
        storage: How the target stores them.
    """
    narrowed = [_narrowed(demand, fast_bits) for demand in demands]
    least = sum(min(stored_bytes(d.group, scheme, storage) for scheme in d.schemes) for d in narrowed)
    room = int(limits.bits * sum(d.group.source.size for d in demands) / 8)
    return narrowed if fast_bits and least <= room else list(demands)


def _narrowed(demand: Demand, fast_bits: Collection[int]) -> Demand:
    schemes = tuple(scheme for scheme in demand.schemes if scheme.bits in fast_bits)
    return replace(demand, schemes=schemes or demand.schemes)
