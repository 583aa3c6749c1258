"""The recorded work of splitting a weight of three or more axes into the factors of its Tucker or CP decomposition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.weights.jobs import TensorSpec, Tile, TileOutput, WeightJob
from onnxslim_llm.ir.weights.weight import Weight
from onnxslim_llm.passes.lowrank.tensor_decomposition import cp, cp_tensor, hosvd, tucker_tensor

__all__ = ["Decomposition", "TensorFactorJob", "TensorLayout", "experts", "kernel"]

Array = NDArray[Any]

Decomposition = Literal["tucker", "cp"]

#: Part of the fingerprint: raise it when the same request gives other bytes.
_VERSION = 1


@dataclass(frozen=True)
class TensorLayout:
    """How a weight is a tensor T[m, i, o] of m matrices: those of experts, or one for each place of a kernel.

    Attributes:
        kind: "experts" for W[E, K, N], "kernel" for W[O, I, *places].
        shape: Of the weight.
    """

    kind: Literal["experts", "kernel"]
    shape: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(m, i, o)."""
        if self.kind == "experts":
            return self.shape[0], self.shape[1], self.shape[2]
        return math.prod(self.shape[2:]), self.shape[1], self.shape[0]

    def tensor(self, weight: Array) -> Array:
        """Return T, float64."""
        wide = np.asarray(weight, np.float64)
        if self.kind == "experts":
            return wide
        return np.transpose(wide.reshape(*self.shape[:2], -1), (2, 1, 0))

    def parameters(self, decomposition: Decomposition, ranks: tuple[int, int]) -> int:
        """Return how many numbers the factors have."""
        m, i, o = self.sizes
        core = ranks[0] * m if decomposition == "cp" else ranks[0] * ranks[1] * m
        return ranks[0] * i + core + ranks[1] * o

    def stored_shapes(self, decomposition: Decomposition, ranks: tuple[int, int]) -> list[tuple[int, ...]]:
        """Return the shapes of the three factors as the operators read them."""
        m, i, o = self.sizes
        first, last = ranks
        if self.kind == "experts":
            return [(i, first), (m, 1 if decomposition == "cp" else first, last), (last, o)]
        places = self.shape[2:]
        ones = (1,) * len(places)
        return [(first, i, *ones), (last, 1 if decomposition == "cp" else first, *places), (o, last, *ones)]

    def stored(self, decomposition: Decomposition, factors: Sequence[Array]) -> list[Array]:
        """Return U[i, r], the core [m, r or 1, s], V[o, s] as the operators read them."""
        inner, core, outer = factors
        if self.kind == "experts":
            return [inner, core, outer.T]
        shapes = self.stored_shapes(decomposition, (inner.shape[1], outer.shape[1]))
        parts = (inner.T, np.transpose(core, (2, 1, 0)), outer)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def experts(shape: tuple[int, ...]) -> TensorLayout:
    """Return the layout of W[E, K, N], which a batched MatMul reads."""
    return TensorLayout("experts", shape)


def kernel(shape: tuple[int, ...]) -> TensorLayout:
    """Return the layout of W[O, I, *places], which Conv reads."""
    return TensorLayout("kernel", shape)


def factors_of(tensor: Array, decomposition: Decomposition, ranks: tuple[int, int]) -> tuple[list[Array], Array]:
    """Return U[i, r], the core [m, r or 1, s] and V[o, s], and the tensor that they stand for."""
    if decomposition == "tucker":
        core, factors = hosvd(tensor, (len(tensor), *ranks))
        return [factors[1], np.tensordot(factors[0], core, axes=1), factors[2]], tucker_tensor(core, factors)
    found = cp(tensor, ranks[0])
    return [found[1], found[0][:, None, :], found[2]], cp_tensor(found)


class TensorFactorJob(WeightJob):
    """Decompose a weight; the outputs are three factors in the layout that the operators read.

    Args:
        source: The weight.
        layout: How it is a tensor.
        decomposition: "tucker" or "cp".
        ranks: Of the input and output channels; the same number twice for CP.
        name: Name of the weight, for messages.
    """

    def __init__(
        self, source: Weight, layout: TensorLayout, decomposition: Decomposition, ranks: tuple[int, int], name: str
    ) -> None:
        self.inputs = (source,)
        self.layout, self.decomposition, self.ranks, self.name = layout, decomposition, ranks, name
        shapes = layout.stored_shapes(decomposition, ranks)
        self.outputs = tuple(TensorSpec(shape, source.onnx_dtype) for shape in shapes)
        self.fingerprint = f"tensor factors v{_VERSION} {decomposition} {layout.kind} {ranks}"

    def where(self) -> str:
        """Return the name of the weight."""
        return self.name

    def tiles(self) -> Sequence[Tile]:
        """Return the tensor as a whole."""
        return [Tile(0, 1, 6 * 8 * self.inputs[0].size)]

    def run(self, tile: Tile) -> TileOutput:
        """Compute the factors.

        Raises:
            ModelError: The weight holds NaN or infinite values.
        """
        source = self.inputs[0].view()
        tensor = self.layout.tensor(source)
        if not np.isfinite(tensor).all():
            todo = "export the model again, or leave this weight alone with factor_tensors.exclude"
            raise ModelError("the weight has NaN or infinite values", where=f"tensor '{self.name}'", todo=todo)
        factors, approximation = factors_of(tensor, self.decomposition, self.ranks)
        stats = {
            "sq_error": float(np.square(tensor - approximation).sum()),
            "sq_weight": float(np.square(tensor).sum()),
        }
        stored = [
            np.ascontiguousarray(part.astype(source.dtype)) for part in self.layout.stored(self.decomposition, factors)
        ]
        return TileOutput([(i, 0, part.reshape(-1).view(np.uint8)) for i, part in enumerate(stored)], stats)

    def finish(self, stats: list[dict[str, float]]) -> dict[str, Any]:
        """Say what the missing directions cost."""
        total = super().finish(stats)
        total["relative_error"] = math.sqrt(total["sq_error"] / total["sq_weight"]) if total["sq_weight"] else 0.0
        return total
