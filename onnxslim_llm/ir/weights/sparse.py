"""Sparse initializers."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import SparseTensorProto
from onnx_graphsurgeon.ir.tensor import SparseValues

from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.weights.weight import Weight

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined]  # Python 3.12

__all__ = ["SparseWeight"]


class SparseWeight(Weight, SparseValues):  # type: ignore[misc]  # graphsurgeon is untyped
    """A tensor given by its non-zero values and their places.

    Args:
        proto: Dimensions and what else the proto said; its values and indices are in the two weights.
        values: The non-zero values, shape [NNZ].
        indices: int64 places: [NNZ] positions in the flattened tensor or [NNZ, rank] coordinates.

    Attributes:
        nbytes: Bytes of the stored values and indices.
    """

    def __init__(self, proto: SparseTensorProto, values: Weight, indices: Weight) -> None:
        super().__init__(tuple(proto.dims), values.onnx_dtype, values.nbytes + indices.nbytes)
        self.proto = proto
        self.sparse_values = values
        self.sparse_indices = indices

    @property
    def storage_key(self) -> Hashable:
        """Identity of the raw bytes, see `Weight.storage_key`."""
        return ("sparse", self.sparse_values.key, self.sparse_indices.key)

    def view(self) -> np.ndarray:
        """Return the dense tensor.

        Raises:
            ModelError: An index lies outside of the tensor, or their number does not fit.
        """
        values, indices = self.sparse_values.view(), self.sparse_indices.view()
        dense = np.zeros(self.shape, values.dtype)
        try:
            if indices.ndim == 1:
                _in_bounds(indices, np.asarray(dense.size))
                dense.reshape(-1)[indices] = values
            else:
                _in_bounds(indices, np.asarray(self.shape))
                dense[tuple(indices.T)] = values
        except (IndexError, ValueError) as error:
            name = self.proto.values.name
            raise ModelError(f"bad indices in a sparse tensor: {error}", where=f"tensor '{name}'") from error
        dense.flags.writeable = False
        return dense

    def raw(self) -> Buffer:
        """Return the raw bytes, see `Weight.raw`."""
        raise ModelError("a sparse tensor has no raw bytes", where=f"tensor '{self.proto.values.name}'")

    def digest(self) -> bytes:
        """Return the SHA-256, see `Weight.digest`; strings are hashed with their lengths."""
        if self._digest is None:
            parts = self.sparse_values.digest() + self.sparse_indices.digest()
            self._digest = hashlib.sha256(f"sparse {self.shape}\n".encode() + parts).digest()
        return self._digest

    @property
    def tensor(self) -> onnx.SparseTensorProto:
        """The content as a proto of its own."""
        copy = SparseTensorProto()
        copy.CopyFrom(self.proto)
        return copy


def _in_bounds(indices: np.ndarray, bounds: np.ndarray) -> None:
    if (indices < 0).any() or (indices >= bounds).any():
        raise IndexError("an index lies outside of the tensor")
