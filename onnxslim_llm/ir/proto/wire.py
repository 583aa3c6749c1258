"""Leave large inline tensors in the file: a scan of the protobuf wire format.

Parsing a model with inline weights would copy all of them into memory, twice. `strip_raw_data` walks through the file
first (https://protobuf.dev/programming-guides/encoding), touches only the headers of large fields, and returns the same
message with every large `TensorProto.raw_data` replaced by a short mark that says where its bytes are.
"""

from __future__ import annotations

import struct

__all__ = ["INLINE_BYTES", "PLACE", "WireError", "encode_varint", "strip_raw_data"]

INLINE_BYTES = 4096
"""Raw data of at least this many bytes (one page) stays in the file."""

PLACE = struct.Struct("<QQ")
"""What follows the mark: offset and length of the raw data in the file, in bytes."""

_RAW = "raw"
# Field numbers of onnx.proto on the ways that lead to a TensorProto's raw_data. Attributes of type TENSORS, GRAPHS or
# SPARSE_TENSOR(S) are not followed: the reader keeps them as protos, as a whole.
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {9: _RAW},
}
_VARINT, _FIXED64, _BYTES, _GROUP, _GROUP_END, _FIXED32 = range(6)
_MAX_DEPTH = 100  # protobuf's own limit for nested messages
_MAX_VARINT = 10


class WireError(ValueError):
    """The bytes are no protobuf message. `truncated` is True if they end too early."""

    def __init__(self, message: str, truncated: bool = False) -> None:
        super().__init__(message)
        self.truncated = truncated


def strip_raw_data(data: memoryview, mark: bytes) -> bytes:
    """Return the serialized ModelProto in `data` with large raw data replaced by `mark` + PLACE(offset, length).

    Raises:
        WireError: `data` is no protobuf message.
    """
    return _strip(data, 0, len(data), "model", mark, 0)


def _strip(data: memoryview, start: int, stop: int, kind: str, mark: bytes, depth: int) -> bytes:
    children = _CHILDREN[kind] if depth < _MAX_DEPTH else {}
    pieces: list[bytes | memoryview] = []
    position = kept = start
    while position < stop:
        head = position
        tag, position = _varint(data, position, stop)
        wire_type = tag & 7
        if wire_type == _BYTES:
            length, position = _varint(data, position, stop)
            end = position + length
            if end > stop:
                raise WireError(f"a field of {length} bytes at byte {head} runs over the end at {stop}", truncated=True)
            child = children.get(tag >> 3) if length >= INLINE_BYTES else None
            if child is not None:
                if child == _RAW:
                    short = mark + PLACE.pack(position, length)
                else:
                    short = _strip(data, position, end, child, mark, depth + 1)
                if len(short) != length:
                    pieces += [data[kept:head], encode_varint(tag), encode_varint(len(short)), short]
                    kept = end
            position = end
        else:
            position = _skip(data, position, stop, wire_type, head)
    pieces.append(data[kept:stop])
    return b"".join(pieces)


def _skip(data: memoryview, position: int, stop: int, wire_type: int, head: int) -> int:
    if wire_type == _VARINT:
        return _varint(data, position, stop)[1]
    if wire_type in (_FIXED64, _FIXED32):
        position += 8 if wire_type == _FIXED64 else 4
        if position > stop:
            raise WireError(f"a number at byte {head} runs over the end at {stop}", truncated=True)
        return position
    if wire_type in (_GROUP, _GROUP_END):
        # Groups are not in ONNX; one in an unknown field needs no special care, its contents are fields like others.
        return position
    raise WireError(f"byte {head} starts no protobuf field")


def _varint(data: memoryview, position: int, stop: int) -> tuple[int, int]:
    value = shift = 0
    for index in range(position, min(stop, position + _MAX_VARINT)):
        byte = data[index]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, index + 1
        shift += 7
    if stop - position < _MAX_VARINT:
        raise WireError(f"a number at byte {position} runs over the end at {stop}", truncated=True)
    raise WireError(f"byte {position} starts no protobuf number")


def encode_varint(value: int) -> bytes:
    """Return a number as protobuf writes it, seven bits a byte."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
