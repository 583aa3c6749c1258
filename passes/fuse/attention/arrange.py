"""Nodes that bring a tensor from one layout of its axes into another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import onnx_graphsurgeon as gs

from onnxslim_llm.passes.fuse.attention.axes import Atom, View, leaves, size_of
from onnxslim_llm.rewrite.edit import Builder

__all__ = ["Arrangement", "arrange"]

Piece = tuple[int, ...]
_Layout = list[list[Piece]]


@dataclass
class Arrangement:
    """The operators, in order, that turn one layout into another.

    Attributes:
        steps: (operator, list of numbers): Reshape with its target, Transpose with its perm, Squeeze and Unsqueeze
            with their axes.
    """

    steps: list[tuple[str, list[int]]] = field(default_factory=list)

    def emit(self, op: Builder, tensor: gs.Tensor) -> gs.Tensor:
        """Make the nodes; return the arranged tensor."""
        for operator, numbers in self.steps:
            if operator == "Transpose":
                tensor = op.Transpose(tensor, perm=numbers)
            else:
                tensor = op.call("", operator, tensor, numbers)
        return tensor


def arrange(source: View, wanted: View) -> Arrangement | None:
    """Return how to get from `source` to `wanted`.

    None if they are not made of the same atoms, or if a Reshape would have to ask for two sizes that are no numbers.
    """
    atoms = {id(atom): atom for axis in source for atom in leaves(axis)}
    before, after = [[id(a) for a in leaves(x)] for x in source], [[id(a) for a in leaves(x)] for x in wanted]
    if sorted(i for axis in before for i in axis) != sorted(i for axis in after for i in axis):
        return None
    found = Arrangement()
    if before == after:
        return found
    flat_before, flat_after = [i for x in before for i in x], [i for x in after for i in x]
    if flat_before == flat_after:
        target = _target([[(i,) for i in x] for x in before], [[(i,) for i in x] for x in after], atoms)
        if target is not None:
            found.steps.append(("Reshape", target))
            return found
        if [x for x in before if x] == [x for x in after if x]:
            found.steps += _ones(before, after)
            return found
    pieces = _cut(before, after)
    split = [[piece] for axis in pieces for piece in axis]
    if not _split(found, pieces, split, atoms):
        return None
    joined = _joined(pieces, after)
    order = [piece for axis in joined for piece in axis]
    perm = [axis[0] for axis in split]
    if perm != order:
        found.steps.append(("Transpose", [perm.index(piece) for piece in order]))
    if [[piece] for piece in order] != joined:
        target = _target([[piece] for piece in order], joined, atoms)
        if target is None:
            return None
        found.steps.append(("Reshape", target))
    return found


def _ones(before: list[list[int]], after: list[list[int]]) -> list[tuple[str, list[int]]]:
    """Return the steps that take away and put in axes of size 1."""
    gone: list[int] = []
    new: list[int] = []
    i = j = 0
    while i < len(before) or j < len(after):
        old_one, new_one = i < len(before) and not before[i], j < len(after) and not after[j]
        if old_one and not new_one:
            gone.append(i)
        elif new_one and not old_one:
            new.append(j)
        i += old_one or not new_one
        j += new_one or not old_one
    return [(operator, axes) for operator, axes in (("Squeeze", gone), ("Unsqueeze", new)) if axes]


def _cut(before: list[list[int]], after: list[list[int]]) -> _Layout:
    """Cut the axes of `before` into the longest runs that stay together in `after`."""
    follower = {a: b for axis in after for a, b in pairwise(axis)}
    layout: _Layout = []
    for axis in before:
        runs: list[list[int]] = []
        for atom in axis:
            if runs and follower.get(runs[-1][-1]) == atom:
                runs[-1].append(atom)
            else:
                runs.append([atom])
        layout.append([tuple(run) for run in runs])
    return layout


def _joined(pieces: _Layout, after: list[list[int]]) -> _Layout:
    by_first = {piece[0]: piece for axis in pieces for piece in axis}
    joined: _Layout = []
    for axis in after:
        parts: list[Piece] = []
        while sum(map(len, parts)) < len(axis):
            parts.append(by_first[axis[sum(map(len, parts))]])
        joined.append(parts)
    return joined


def _split(found: Arrangement, pieces: _Layout, split: _Layout, atoms: dict[int, Atom]) -> bool:
    if all(len(axis) == 1 for axis in pieces):
        return True
    target = _target(pieces, split, atoms)
    if target is None:
        # New axes of size 1 behind those that are split let the later ones keep their places, so that 0 copies them.
        aligned: _Layout = []
        new: list[int] = []
        for axis in pieces:
            aligned.append(axis)
            for _ in axis[1:]:
                new.append(len(aligned))
                aligned.append([])
        if not new or any(not axis for axis in pieces):
            return False
        target = _target(aligned, split, atoms)
        if target is None:
            return False
        found.steps.append(("Unsqueeze", new))
    found.steps.append(("Reshape", target))
    return True


def _target(before: Sequence[Sequence[Piece]], after: Sequence[Sequence[Piece]], atoms: dict[int, Atom]) -> Any:
    """Return the operand of a Reshape, or None if it takes more than one -1."""
    target: list[int] = []
    for place, axis in enumerate(after):
        size = size_of(atoms[i] for piece in axis for i in piece)
        if isinstance(size, int):
            target.append(size)
        else:
            flat = [i for piece in axis for i in piece]
            same = place < len(before) and [i for piece in before[place] for i in piece] == flat
            target.append(0 if same else -1)
    return target if target.count(-1) <= 1 else None
