"""Where a model's bytes are: weights by role and by type, each distinct content counted once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxslim_llm.ir.roles import ROLES, constant_roles
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.ir.weights.dtypes import dtype_name

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model

__all__ = ["WeightUse", "bytes_by_dtype", "bytes_by_role", "weight_uses"]


@dataclass(frozen=True)
class WeightUse:
    """One stored weight.

    Attributes:
        name: The first initializer that holds it.
        role: One of `roles.ROLES`.
        dtype: Element type as ONNX calls it, in lower case.
        shape: Dimensions.
        nbytes: Bytes as stored (sub-byte types packed).
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def weight_uses(model: Model) -> list[WeightUse]:
    """The distinct stored weights of a model in graph order; nothing is loaded.

    A content that several initializers share is listed once, with the strongest of its roles.
    """
    found: dict[Hashable, WeightUse] = {}
    for constant, role in constant_roles(model):
        weight = weight_of(constant).storage
        known = found.get(weight.storage_key)
        if known is None:
            name, dtype = constant.name, dtype_name(weight.onnx_dtype).lower()
            found[weight.storage_key] = WeightUse(name, role, dtype, weight.shape, weight.nbytes)
        elif role == "embedding" != known.role:
            found[weight.storage_key] = WeightUse(known.name, role, known.dtype, known.shape, known.nbytes)
    return list(found.values())


def bytes_by_role(uses: Iterable[WeightUse]) -> dict[str, int]:
    """Bytes for each role that occurs, in the order of `ROLES`."""
    total: Counter[str] = Counter()
    for use in uses:
        total[use.role] += use.nbytes
    return {role: total[role] for role in ROLES if role in total}


def bytes_by_dtype(uses: Iterable[WeightUse]) -> dict[str, int]:
    """Bytes for each element type, largest first."""
    total: Counter[str] = Counter()
    for use in uses:
        total[use.dtype] += use.nbytes
    return dict(total.most_common())
