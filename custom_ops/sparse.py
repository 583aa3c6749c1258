"""The sparse packed weight in numpy: a packed weight without the codes that are the zero point of their block.

``src/packing/sparse_weight.h`` describes the format and is its twin: both must give the same bytes. A bitmap says which
codes are stored, so that a place takes ``density * bits + 1`` bits where the packed weight takes ``bits``, and up to
2 % more where the nibbles of a chunk are not shared out evenly. Both forms hold the same codes, scales and zero points:
each can be made of the other, byte for byte. Codes of 2 and 3 bits have no sparse form.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim_llm.custom_ops import packed as dense
from onnxslim_llm.custom_ops.packed_header import (
    HEADER,
    HEADER_BYTES,
    STRIP_COLUMNS,
    PackedScheme,
    header,
    scheme_of_header,
)

__all__ = ["MAGIC", "TAIL_BYTES", "VERSION", "SparseParts", "break_even", "expand", "is_sparse", "make_sparse", "parse"]

Array = npt.NDArray[Any]

MAGIC = b"oslspar\n"
VERSION = 1
TAIL_BYTES = 64
"""Zeros at the end: kernels read whole vectors."""

_OFFSET = np.dtype("<u8")
_WORD_ROWS = 4
_NIBBLE_ROWS = 16
_WRONG_TABLE = "the strips of the sparse packed weight do not end where its table says"


@dataclass(frozen=True)
class SparseParts:
    """What a sparse packed weight consists of.

    Attributes:
        scheme: of the packed weight that it expands to.
        offsets: [strips + 1], bytes from the end of the header; the last one ends the last strip.
        values: codes that are stored.
    """

    scheme: PackedScheme
    offsets: npt.NDArray[np.int64]
    values: int

    @property
    def density(self) -> float:
        """Stored codes among all places, padding included."""
        scheme = self.scheme
        return self.values / (scheme.strips * STRIP_COLUMNS * scheme.chunks * scheme.chunk_rows)


def break_even(bits: int) -> float:
    """The share of codes at the zero point above which the sparse form is the smaller one."""
    return 1 / bits


def is_sparse(data: Array) -> bool:
    """Whether uint8 [bytes] mean to be a sparse packed weight."""
    return bool(data.size >= len(MAGIC) and data[: len(MAGIC)].tobytes() == MAGIC)


def make_sparse(packed: Array) -> npt.NDArray[np.uint8]:
    """The sparse form of a packed weight.

    Args:
        packed: uint8, see :mod:`packed`.

    Raises:
        ValueError: ``packed`` is no packed weight, or one of 2 or 3 bits.
    """
    scheme = dense.parse(packed)
    _check_bits(scheme)
    codes, fixed = _codes_and_rest(packed, scheme)
    fill = _fill(fixed, scheme)
    pieces: list[Array] = []
    ends = [(scheme.strips + 1) * _OFFSET.itemsize]
    for strip in range(scheme.strips):
        start = len(pieces)
        for chunk in range(scheme.chunks):
            present = codes[strip, chunk] != fill[strip, chunk]
            bitmap = np.packbits(present, axis=None, bitorder="little")
            pieces += [bitmap, fixed[strip, chunk], _values_of(codes[strip, chunk], present, scheme.bits)]
        ends.append(ends[-1] + sum(piece.size for piece in pieces[start:]))
    table = np.array(ends, _OFFSET).view(np.uint8)
    body = np.concatenate([table, *pieces, np.zeros(TAIL_BYTES, np.uint8)])
    return np.concatenate([_header(scheme, body.size), body])


def expand(sparse: Array) -> npt.NDArray[np.uint8]:
    """The packed weight that a sparse one was made of.

    Raises:
        ValueError: see :func:`parse`.
    """
    parts = parse(sparse)
    scheme = parts.scheme
    payload = sparse[HEADER_BYTES:]
    bitmap_bytes, fixed_bytes = _chunk_sizes(scheme)
    fixed = np.empty((scheme.strips, scheme.chunks, fixed_bytes), np.uint8)
    codes = np.empty((scheme.strips, scheme.chunks, scheme.chunk_rows * STRIP_COLUMNS), np.uint8)
    for strip in range(scheme.strips):
        at = int(parts.offsets[strip])
        for chunk in range(scheme.chunks):
            present = np.unpackbits(payload[at : at + bitmap_bytes], bitorder="little").astype(bool)
            at += bitmap_bytes
            fixed[strip, chunk] = payload[at : at + fixed_bytes]
            at += fixed_bytes
            here = _fill(fixed[strip : strip + 1, chunk : chunk + 1], scheme)[0, 0]
            planes = _planes(present, scheme.bits)
            for number, places in enumerate(planes):
                own = present & places
                here[own] = payload[at : at + int(own.sum())] >> np.uint8(4 * number) & np.uint8(2**scheme.bits - 1)
            codes[strip, chunk] = here
            at += max(int((present & places).sum()) for places in planes)
    packed_codes = dense.planes_of(_by_row(codes, scheme), scheme.bits)
    return np.concatenate([header(scheme), np.concatenate([packed_codes, fixed], axis=2).reshape(-1)])


def parse(sparse: Array) -> SparseParts:
    """What the header and the table say, checked against all bitmaps.

    Raises:
        ValueError: the bytes are not a sparse packed weight of this version, or not a whole one.
    """
    if sparse.size < HEADER_BYTES:
        raise ValueError("the sparse packed weight is shorter than its header")
    if not is_sparse(sparse):
        raise ValueError("these bytes are not a sparse packed weight")
    found = np.frombuffer(sparse[:HEADER_BYTES].tobytes(), HEADER)[0]
    if found["version"] != VERSION:
        raise ValueError(f"the sparse packed weight has version {found['version']}, this library reads {VERSION}")
    scheme = scheme_of_header(found)
    _check_bits(scheme)
    payload = sparse[HEADER_BYTES:]
    if not np.array_equal(_header(scheme, payload.size), sparse[:HEADER_BYTES]):
        raise ValueError("the sizes in the header of the sparse packed weight contradict each other")
    end, table = payload.size - TAIL_BYTES, (scheme.strips + 1) * _OFFSET.itemsize
    if end < table:
        raise ValueError("the sparse packed weight is not as long as its header says")
    offsets = np.frombuffer(payload[:table].tobytes(), _OFFSET)
    if offsets[0] != table or offsets[-1] != end or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(_WRONG_TABLE)
    places = offsets.astype(np.int64)
    values = sum(_walk(payload, scheme, int(a), int(b)) for a, b in pairwise(places))
    return SparseParts(scheme, places, values)


def _walk(payload: Array, scheme: PackedScheme, at: int, end: int) -> int:
    """Follow the chunks of a strip, and return how many codes are stored in it."""
    bitmap_bytes, fixed_bytes = _chunk_sizes(scheme)
    values = 0
    for _ in range(scheme.chunks):
        if end - at < bitmap_bytes + fixed_bytes:
            raise ValueError(_WRONG_TABLE)
        present = np.unpackbits(payload[at : at + bitmap_bytes], bitorder="little").astype(bool)
        counts = [int((present & places).sum()) for places in _planes(present, scheme.bits)]
        at += bitmap_bytes + fixed_bytes + max(counts)
        values += sum(counts)
    if at != end:
        raise ValueError(_WRONG_TABLE)
    return values


def _chunk_sizes(scheme: PackedScheme) -> tuple[int, int]:
    """Bytes of a chunk's bitmap, and of its scales and zero points."""
    return scheme.chunk_rows * STRIP_COLUMNS // 8, sum(scheme.chunk_parts[1:])


def _header(scheme: PackedScheme, payload_bytes: int) -> npt.NDArray[np.uint8]:
    fields = np.frombuffer(header(scheme).tobytes(), HEADER).copy()
    fields["magic"], fields["version"] = MAGIC, VERSION
    fields["chunk_bytes"], fields["payload_bytes"] = sum(_chunk_sizes(scheme)), payload_bytes
    return fields.view(np.uint8)


def _codes_and_rest(packed: Array, scheme: PackedScheme) -> tuple[Array, Array]:
    """Codes [strips, chunks, places] in the order of the bitmap; scales and zero points [strips, chunks, bytes]."""
    code_bytes = scheme.chunk_parts[0]
    chunks = packed[HEADER_BYTES:].reshape(scheme.strips, scheme.chunks, -1)
    rows = dense.codes_of_planes(chunks[:, :, :code_bytes], scheme.bits, scheme.chunk_rows)
    cut = rows.reshape(scheme.strips, scheme.chunks, -1, _WORD_ROWS, STRIP_COLUMNS)
    return np.swapaxes(cut, -1, -2).reshape(scheme.strips, scheme.chunks, -1), chunks[:, :, code_bytes:]


def _by_row(codes: Array, scheme: PackedScheme) -> Array:
    """Codes in the order of the bitmap as [strips, chunks, rows, 16]."""
    cut = codes.reshape(scheme.strips, scheme.chunks, -1, STRIP_COLUMNS, _WORD_ROWS)
    return np.swapaxes(cut, -1, -2).reshape(scheme.strips, scheme.chunks, scheme.chunk_rows, STRIP_COLUMNS)


def _fill(fixed: Array, scheme: PackedScheme) -> Array:
    """The zero point of every place, [strips, chunks, places] in the order of the bitmap."""
    strips, chunks = fixed.shape[:2]
    blocks = scheme.chunk_rows // scheme.block
    if scheme.symmetric:
        return np.full((strips, chunks, scheme.chunk_rows * STRIP_COLUMNS), 1 << (scheme.bits - 1), np.uint8)
    stored = fixed[:, :, scheme.chunk_parts[1] :].reshape(strips, chunks, -1, STRIP_COLUMNS)
    if scheme.bits < 8:
        stored = np.stack([stored & 15, stored >> 4], axis=3).reshape(strips, chunks, -1, STRIP_COLUMNS)
    zeros = stored[:, :, :blocks] & np.uint8(2**scheme.bits - 1)
    words = np.repeat(np.repeat(zeros, _WORD_ROWS, axis=3), scheme.block // _WORD_ROWS, axis=2)
    return words.reshape(strips, chunks, -1)


def _planes(places: Array, bits: int) -> list[Array]:
    """Which of a chunk's places have their codes in the low nibbles, and which in the high ones."""
    if bits == 8:
        return [np.ones(places.shape, bool)]
    high = np.arange(places.size) // (_NIBBLE_ROWS * STRIP_COLUMNS) % 2 == 1
    return [~high, high]


def _values_of(codes: Array, present: Array, bits: int) -> Array:
    planes = [codes[present & places] for places in _planes(present, bits)]
    values = np.zeros(max(plane.size for plane in planes), np.uint8)
    for number, plane in enumerate(planes):
        values[: plane.size] |= plane << np.uint8(4 * number)
    return values


def _check_bits(scheme: PackedScheme) -> None:
    if scheme.bits not in (4, 8):
        raise ValueError(f"codes of {scheme.bits} bits have no sparse form")
