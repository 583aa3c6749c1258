"""Rotary position embeddings become one node each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.opset import CONCEPT_OPSET, raise_opset
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.passes.fuse.rotary.build import Layout, RotaryBuilder, layout_of
from onnxslim_llm.passes.fuse.rotary.elements import Elements
from onnxslim_llm.passes.fuse.rotary.match import ROOTS, Rotation, find_rotation
from onnxslim_llm.passes.fuse.rotary.tables import Table, TableProofs, table_of
from onnxslim_llm.rewrite.edit import Builder, inherit_metadata, remove_dead, replace_output
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.rule import Refusal
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["FuseRotary"]


@dataclass(frozen=True)
class _Site:
    graph: gs.Graph
    rotation: Rotation
    layout: Layout
    cosines: Table
    sines: Table


@dataclass(frozen=True)
class FuseRotary(Pass):
    """Replace the operators of each rotary embedding by one, that takes tables of half the head's width.

    A rotation is recognised by what becomes of each element, so that it does not matter which operators spell it:
    halves (Llama, GPT-NeoX) or neighbours (GPT-J), Slice, Split or Gather, Neg or a product with -1, complex numbers,
    a part of the head that is passed on. The tables may be constants, gathered by position, or computed; cosines and
    sines that are computed for each element of a head are computed for each pair, once for all layers.

    Before:
        agraph (float[B, 4, S, 16] x, float[B, S, 8] angles) => (float[B, 4, S, 16] y)
        <int64[1] zero = {0}, int64[1] one = {1}, int64[1] half = {8}, int64[1] end = {16}, int64[1] last = {-1}>
        {
            both = Concat <axis = -1> (angles, angles)
            c0 = Cos (both)
            s0 = Sin (both)
            c = Unsqueeze (c0, one)
            s = Unsqueeze (s0, one)
            x1 = Slice (x, zero, half, last)
            x2 = Slice (x, half, end, last)
            minus = Neg (x2)
            turned = Concat <axis = -1> (minus, x1)
            a = Mul (x, c)
            b = Mul (turned, s)
            y = Add (a, b)
        }

    After:
        agraph (float[B, 4, S, 16] x, float[B, S, 8] angles) => (float[B, 4, S, 16] y)
        <int64[3] flat = {0, 0, 64}, int64[4] heads = {0, 0, 4, 16}>
        {
            c = Cos (angles)
            s = Sin (angles)
            tokens = Transpose <perm = [0, 2, 1, 3]> (x)
            x3 = Reshape (tokens, flat)
            y3 = onnxslim_llm.RotaryHalf <num_heads = 4, rotary_dim = 16> (x3, c, s)
            y4 = Reshape (y3, heads)
            y = Transpose <perm = [0, 2, 1, 3]> (y4)
        }

    Skips when:
        - it rotates backwards (the sign is on the other product), or the pairs are neither halves nor neighbours;
        - the cosines of a pair, or its sines, are not the same by construction;
        - cosine and sine are computed from different angles, or only one of them is scaled;
        - the tables differ from head to head, or have no axis of tokens;
        - the number of heads, the size of a head or the rank is not known;
        - a product or sum on the way is also used elsewhere or an output of the model.
    """

    name: ClassVar[str] = "fuse_rotary"
    group: ClassVar[str] = "fuse"

    def apply(self, model: Model, context: Context) -> Change:
        """Fuse the top graph and its subgraphs."""
        change = Change()
        search = _Search(model)
        if search.sites and (model.opset() or 0) < CONCEPT_OPSET:
            if not raise_opset(model, change):
                return change
            search = _Search(model)
        for where, reason in search.misses():
            change.skip(where, reason)
        outputs = graph_output_ids(model)
        builder = RotaryBuilder(search.elements)
        for site in search.sites:
            change.sites.append(site.rotation.output.name)
            _replace(model, site, builder, outputs)
        return change


class _Search:
    """The rotary embeddings of a model, and what nearly is one."""

    def __init__(self, model: Model) -> None:
        self.elements = Elements(infer_shapes(model))
        self.sites: list[_Site] = []
        self._proofs = TableProofs(self.elements)
        self._outputs = graph_output_ids(model)
        self._taken: set[int] = set()
        self._missed: list[tuple[frozenset[int], Refusal, str]] = []
        for graph in model.graphs():
            found: list[_Site] = []
            for node in reversed(graph.nodes):  # the whole head before its rotated part
                if node.op in ROOTS and normal_domain(node.domain) == "" and id(node) not in self._taken:
                    site = self._site(graph, node)
                    if site is not None:
                        found.append(site)
                        self._taken |= {id(inner) for inner in site.rotation.inner}
            self.sites += reversed(found)

    def _site(self, graph: gs.Graph, node: gs.Node) -> _Site | None:
        rotation = find_rotation(self.elements, node)
        if rotation is None:
            return None
        where = node.outputs[0].name
        if not isinstance(rotation, Rotation):
            self._missed.append((rotation.inner, rotation.refusal, where))
            return None
        refusal = self._closed(rotation) or self._proofs.refusal(rotation)
        cosines, sines = table_of(rotation.cosines), table_of(rotation.sines)
        if refusal is None and (cosines is None or sines is None):
            refusal = Refusal("its cosines or sines come from several tensors, or are one for all pairs", where)
        if refusal is None and cosines is not None and sines is not None:
            layout = layout_of(self.elements, rotation, cosines, sines)
            if isinstance(layout, Layout):
                return _Site(graph, rotation, layout, cosines, sines)
            refusal = layout
        assert refusal is not None
        self._missed.append((frozenset(map(id, rotation.inner)), refusal, where))
        return None

    def _closed(self, rotation: Rotation) -> Refusal | None:
        inner = {id(node) for node in rotation.inner}
        for node in rotation.inner:
            for tensor in node.outputs:
                if tensor is rotation.output or tensor.is_empty():
                    continue
                if id(tensor) in self._outputs:
                    return Refusal("an inner tensor is also a graph output", tensor.name)
                if any(id(user) not in inner for user in tensor.outputs):
                    return Refusal("an inner tensor is used elsewhere too", tensor.name)
        return None

    def misses(self) -> list[tuple[str, str]]:
        """Return (where, reason) of what nearly is a rotary embedding; once for each, its whole before its parts."""
        seen = set(self._taken)
        found = []
        for inner, refusal, where in self._missed:
            if not inner & seen:
                found.append((where, f"rotary: {refusal.reason} at '{refusal.culprit}'"))
            seen |= inner
        return found


def _replace(model: Model, site: _Site, builder: RotaryBuilder, outputs: set[int]) -> None:
    old = site.rotation.output
    root = old.inputs[0]
    op = Builder(model, root.name or old.name)
    new = builder.build(op, site.graph, site.rotation, site.layout, site.cosines, site.sines)
    position = next(i for i, node in enumerate(site.graph.nodes) if node is root)
    replace_output(old, new, op.nodes, outputs)
    inherit_metadata(root, old)
    gone = {id(node) for node in remove_dead([root], outputs)}
    before, after = site.graph.nodes[:position], site.graph.nodes[position:]
    site.graph.nodes[:] = [node for node in (*before, *op.nodes, *after) if id(node) not in gone]
