"""TensorProtos to constants: each gets the kind of weight that fits where its data is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from onnxslim_llm.errors import ModelError
from onnxslim_llm.ir.proto.external import ExternalFiles
from onnxslim_llm.ir.proto.skeleton import copy_without
from onnxslim_llm.ir.proto.wire import PLACE
from onnxslim_llm.ir.weights import dtypes
from onnxslim_llm.ir.weights.mapping import MappedFile
from onnxslim_llm.ir.weights.sparse import SparseWeight
from onnxslim_llm.ir.weights.stored import MappedWeight, ProtoWeight
from onnxslim_llm.ir.weights.weight import Weight

__all__ = ["InlineMap", "TensorReader"]

_RAW = frozenset(["raw_data"])
_AGAIN = "the file is broken: download it or export it again"


@dataclass(frozen=True)
class InlineMap:
    """How raw data that stayed in the model file is marked: `raw_data` is the mark, then offset and length."""

    mark: bytes
    file: MappedFile

    def find(self, proto: TensorProto) -> tuple[int, int] | None:
        """Return (offset, length) in the model file, or None if the tensor's data is really in the proto."""
        if not proto.HasField("raw_data"):
            return None
        raw = proto.raw_data
        if len(raw) != len(self.mark) + PLACE.size or not raw.startswith(self.mark):
            return None
        offset, length = PLACE.unpack_from(raw, len(self.mark))
        return offset, length


class TensorReader:
    """Makes weights of TensorProtos.

    Args:
        files: The external files of the model.
        inline: Set if large raw data stayed in the model file.
        weights: Weights for stubs, by location; see `Model.to_stub`.
    """

    def __init__(
        self, files: ExternalFiles, inline: InlineMap | None = None, weights: Mapping[str, Weight] | None = None
    ) -> None:
        self._files = files
        self._inline = inline
        self._weights = weights or {}

    def constant(self, proto: TensorProto) -> gs.Constant:
        """Return a constant that holds the tensor's weight; checks sizes, reads nothing large.

        Raises:
            ModelError: The data is missing or does not fit the shape.
        """
        weight, skeleton = self.weight(proto)
        location = int(proto.data_location) if proto.HasField("data_location") else None
        result = gs.Constant(proto.name, weight, data_location=location)
        result.skeleton = skeleton
        return result

    def sparse(self, proto: onnx.SparseTensorProto) -> gs.Constant:
        """Return a constant that holds a sparse initializer; its name is that of its values."""
        values, indices = self.weight(proto.values)[0], self.weight(proto.indices)[0]
        return gs.Constant(proto.values.name, SparseWeight(proto, values, indices))

    def weight(self, proto: TensorProto) -> tuple[Weight, TensorProto]:
        """Return the weight and the proto to write it back with."""
        if proto.data_type == TensorProto.UNDEFINED:
            raise ModelError("a tensor has no element type", where=f"tensor '{proto.name}'", todo=_AGAIN)
        if proto.data_location == TensorProto.EXTERNAL:
            for entry in proto.external_data:
                if entry.key == "location" and entry.value in self._weights:
                    return self._weights[entry.value], proto
            return self._files.weight(proto), proto
        place = self._inline.find(proto) if self._inline is not None else None
        if place is not None and self._inline is not None:
            offset, length = place
            skeleton = copy_without(proto, _RAW)
            if not _has_size(proto):
                skeleton.raw_data = self._inline.file.read(offset, length).tobytes()
                return ProtoWeight(skeleton), skeleton
            _check_length(proto, length)
            return MappedWeight(self._inline.file, offset, tuple(proto.dims), proto.data_type, None), skeleton
        _check_inline(proto)
        return ProtoWeight(proto), proto


def _check_inline(proto: TensorProto) -> None:
    if proto.data_type == TensorProto.STRING:
        count, stored, unit = math.prod(proto.dims), len(proto.string_data), "strings"
    elif not _has_size(proto):
        return
    elif proto.HasField("raw_data"):
        _check_length(proto, len(proto.raw_data))
        return
    else:
        count, stored, unit = _typed_counts(proto)
    if count != stored:
        raise _misfit(proto, f"{stored} {unit}", f"{count}")


def _typed_counts(proto: TensorProto) -> tuple[int, int, str]:
    field = helper.tensor_dtype_to_field(proto.data_type)
    stored = len(getattr(proto, field))
    count = math.prod(proto.dims)
    if proto.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
        count *= 2
    elif dtypes.bits_of(proto.data_type) in (2, 4):
        count = dtypes.packed_nbytes(proto.dims, proto.data_type)
    return count, stored, f"values in {field}"


def _has_size(proto: TensorProto) -> bool:
    """Whether type and shape say how many bytes there are; if not, the proto is kept as it is."""
    if proto.data_type == TensorProto.STRING or proto.HasField("segment"):
        return False
    return dtypes.numpy_dtype(proto.data_type) is not None


def _check_length(proto: TensorProto, length: int) -> None:
    if any(dim < 0 for dim in proto.dims):
        raise _misfit(proto, "a negative dimension", "none")
    needed = dtypes.packed_nbytes(proto.dims, proto.data_type)
    if needed != length:
        raise _misfit(proto, f"{length} bytes", f"{needed}")


def _misfit(proto: TensorProto, has: str, wants: str) -> ModelError:
    return ModelError(
        f"a tensor's data does not fit its shape: {has}, {wants} wanted",
        where=f"tensor '{proto.name}', {dtypes.dtype_name(proto.data_type)} {list(proto.dims)}",
        todo=_AGAIN,
    )
