"""Queries, keys and values: which tensors they come from, in which layout, with how many heads, and the KV cache.

The operands of the two products are followed back through everything that only moves elements. Any tensor on the way
can be the operand of the fused attention; the one that leaves the fewest nodes is taken. Axes that the operand has and
such a tensor lacks are repetition, so that repeated key and value heads are found however they are spelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxslim_llm.ir.shapes import SymbolicValues
from onnxslim_llm.ir.shapes.dims import Expr
from onnxslim_llm.passes.fuse.attention.arrange import Arrangement, arrange
from onnxslim_llm.passes.fuse.attention.axes import Atom, Trail, View, exact_quotient, follow_back, leaves, size_of
from onnxslim_llm.passes.fuse.attention.products import NotAttentionError, Product
from onnxslim_llm.passes.fuse.attention.scores import producer

__all__ = ["Axes", "Cache", "Heads", "Operand", "Source", "new_operand", "read_heads"]


@dataclass(frozen=True)
class Axes:
    """Which atoms of a tensor stand for what."""

    batch: list[Atom]
    heads: list[Atom]
    tokens: list[Atom]
    width: list[Atom]

    def layout(self, heads_major: bool) -> View:
        """Return [B, H, S, D] or [B, S, H * D]."""
        if heads_major:
            return [self.batch, self.heads, self.tokens, self.width]
        return [self.batch, self.tokens, [*leaves(self.heads), *leaves(self.width)]]


@dataclass(frozen=True)
class Operand:
    """What a fused attention reads.

    Attributes:
        tensor: Where it comes from.
        arrangement: What brings it into the wanted layout.
        factor: Number that the elements are to be multiplied with.
        cost: Nodes that move data before and after `tensor`.
    """

    tensor: gs.Tensor
    arrangement: Arrangement
    factor: float
    cost: int


@dataclass(frozen=True)
class Cache:
    """A key or value cache: `node` appends `new` to `past` along the sequence, its output is the present."""

    node: gs.Node
    past: gs.Tensor
    new: gs.Tensor


@dataclass(frozen=True)
class Source:
    """An operand of one of the products.

    Attributes:
        trail: How it comes to be.
        axes: What its axes stand for, as the product sees them.
    """

    trail: Trail
    axes: Axes

    def group_counts(self) -> dict[int, int]:
        """Return for the tensors of the trail that can be the operand (by position) how many heads they have."""
        found: dict[int, int] = {}
        for place, view in enumerate(self.trail.views):
            present = {id(atom) for axis in view for atom in leaves(axis)}
            others = (*leaves(self.axes.batch), *leaves(self.axes.tokens), *leaves(self.axes.width))
            heads = [id(atom) in present for atom in leaves(self.axes.heads)]
            # Heads are repeated one by one: all atoms that are missing come after those that are there.
            if all(id(atom) in present for atom in others) and heads == sorted(heads, reverse=True):
                size = size_of(self.kept_heads(sum(heads)))
                if isinstance(size, int):
                    found[place] = size
        return found

    def kept_heads(self, count: int) -> list[Atom]:
        """Return the first `count` atoms of the heads."""
        return leaves(self.axes.heads)[:count]

    def with_heads(self, number: int) -> Axes:
        """Return the axes without repetition, `number` heads being there."""
        heads: list[Atom] = []
        for atom in leaves(self.axes.heads):
            if size_of(heads) == number:
                break
            heads.append(atom)
        return Axes(self.axes.batch, heads, self.axes.tokens, self.axes.width)

    def best(self, number: int, heads_major: bool) -> Operand | None:
        """Return the cheapest operand with `number` heads in a layout."""
        wanted = self.with_heads(number).layout(heads_major)
        places = [place for place, size in self.group_counts().items() if size == number]
        return _cheapest(self.trail, wanted, places)

    def cache(self, number: int, values: SymbolicValues) -> Cache | None:
        """Return the cache that the operand is read from, if its source is one of `number` heads in [B, H, T, D]."""
        if self.group_counts().get(0) != number:
            return None
        there = arrange(self.trail.views[0], self.with_heads(number).layout(True))
        node = producer(self.trail.tensors[0])
        if there is None or there.steps or node is None or node.op != "Concat" or len(node.inputs) != 2:
            return None
        shapes = [values.shape_of(tensor) for tensor in node.inputs]
        if any(shape is None or len(shape) != 4 for shape in shapes) or int(node.attrs.get("axis", 0)) % 4 != 2:
            return None
        return Cache(node, *node.inputs)


@dataclass(frozen=True)
class Heads:
    """The three operands of an attention.

    Attributes:
        q, k, v: Where they come from.
        number: Query heads.
        kv_numbers: Key and value heads that are possible, the smallest first.
        batch_atoms: Atoms of the batch in the scores; the other ones before the last two axes are heads.
    """

    q: Source
    k: Source
    v: Source
    number: int
    kv_numbers: list[int]
    batch_atoms: int


def read_heads(scores: Product, weights: Product, weights_view: View, values: SymbolicValues) -> Heads:
    """Return what the operands of an attention are.

    Args:
        scores: Queries times keys.
        weights: Weights times values.
        weights_view: Axes of the weights, for their sizes.
        values: Shapes.

    Raises:
        NotAttentionError: Something about them is not known, or no attention has it.
    """
    trails = [
        _trail(scores.left, values, scalars=True),
        _trail(scores.right, values, scalars=True),
        _trail(weights.right, values, scalars=False),
    ]
    q_axes, k_axes, v_axes = (
        [trail.views[-1][place] for place in order]
        for trail, order in zip(trails, (scores.left_order, scores.right_order, weights.right_order), strict=True)
    )
    rank = len(scores.out_order)
    if rank < 3:
        raise NotAttentionError("the scores have no batch", scores.node)
    q_batch = _padded(q_axes[:-2], rank - 2)
    if not all(axis or not other for axis, other in zip(q_batch, _padded(k_axes[:-2], rank - 2), strict=True)):
        raise NotAttentionError("the queries are broadcast over the keys", scores.node)
    if len(v_axes) > len(weights_view):
        raise NotAttentionError("the weights are broadcast over the values", weights.node)
    k_batch = _repeated(k_axes[:-2], q_batch)
    v_batch = _repeated(v_axes[:-2], weights_view[:-2])
    for _ in range(2):  # each may split the queries' atoms further
        for node, batch in ((scores.node, k_batch), (weights.node, v_batch)):
            if not _align([a for axis in q_batch for a in axis], [a for axis in batch for a in axis]):
                raise NotAttentionError("the heads of its operands do not fit together", node)
    if rank > 3:
        count = len(leaves(q_batch[0]))
    else:
        # One axis for batch and heads: what was the first axis at the start is the batch.
        start = {id(atom) for atom in leaves(trails[0].views[0][0])} if trails[0].views[0] else set()
        count = sum(id(atom) in start for atom in leaves(q_batch[0]))
    named = [
        _named(trails[0], q_batch, count, tokens=q_axes[-2], width=q_axes[-1]),
        _named(trails[1], k_batch, count, tokens=k_axes[-1], width=k_axes[-2]),
        _named(trails[2], v_batch, count, tokens=v_axes[-2], width=v_axes[-1]),
    ]
    number = size_of(named[0].axes.heads)
    if not isinstance(number, int):
        raise NotAttentionError("the number of heads is not known", scores.node)
    common = set(named[1].group_counts().values()) & set(named[2].group_counts().values())
    if number not in named[0].group_counts().values() or not common:
        raise NotAttentionError("no tensor holds all heads of an operand", scores.node)
    return Heads(named[0], named[1], named[2], number, sorted(common), count)


def _trail(tensor: gs.Tensor, values: SymbolicValues, scalars: bool) -> Trail:
    trail = follow_back(tensor, values, scalars)
    if trail is None:
        raise NotAttentionError("the shape of an operand is not known, or has a size of 0", tensor)
    return trail


def _named(trail: Trail, batch: View, count: int, tokens: list[Atom], width: list[Atom]) -> Source:
    flat = [atom for axis in batch for atom in leaves(axis)]
    return Source(trail, Axes(flat[:count], flat[count:], tokens, width))


def _padded(axes: Sequence[list[Atom]], count: int) -> View:
    return [*[[] for _ in range(count - len(axes))], *axes]


def _repeated(axes: Sequence[list[Atom]], like: View) -> View:
    """Make the broadcasting of a product explicit: an axis of size 1 repeats along that of the other operand."""
    pairs = zip(_padded(axes, len(like)), like, strict=True)
    return [axis or [Atom(size_of([atom])) for atom in leaves(other)] for axis, other in pairs]


def _align(first: list[Atom], second: list[Atom]) -> bool:
    """Split atoms of both lists until they have the same sizes in the same order; return whether that is possible."""
    left, right = leaves(first), leaves(second)
    place = 0
    while place < len(left) and place < len(right):
        a, b = left[place], right[place]
        # Two names for the batch: whether they are equal, the runtime finds out.
        if a.size != b.size and not (place == 0 and isinstance(a.size, Expr) and isinstance(b.size, Expr)):
            more = exact_quotient(a.size, b.size)
            less = exact_quotient(b.size, a.size)
            if more is not None:
                left[place : place + 1] = a.split(b.size, more)
            elif less is not None:
                right[place : place + 1] = b.split(a.size, less)
            else:
                return False
        place += 1
    return len(left) == len(right)


def _cheapest(trail: Trail, wanted: View, places: Sequence[int]) -> Operand | None:
    found: Operand | None = None
    for place in places:
        arrangement = arrange(trail.views[place], wanted)
        if arrangement is not None:
            cost = len(arrangement.steps) + place
            if found is None or cost < found.cost:
                found = Operand(trail.tensors[place], arrangement, trail.factors[place], cost)
    return found


def new_operand(cache: Cache, values: SymbolicValues, heads_major: bool) -> Operand | None:
    """Return the operand for what is appended to a cache."""
    trail = follow_back(cache.new, values)
    if trail is None or len(trail.views[-1]) != 4:
        return None
    batch, heads, tokens, width = trail.views[-1]
    wanted = Axes(batch, heads, tokens, width).layout(heads_major)
    return _cheapest(trail, wanted, range(len(trail.views)))
