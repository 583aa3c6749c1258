"""Cosines and sines of rotary embeddings are looked up instead of computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.concept import calls
from onnxslim_llm.concepts.rotary import ROTARY
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.shapes import SymbolicValues, infer_shapes
from onnxslim_llm.ir.shapes.dims import is_nonnegative
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.passes.fuse.rotary.positions import PositionTable, find_positions, tabulate
from onnxslim_llm.passes.fuse.rotary.steps import producer
from onnxslim_llm.rewrite.constants import constant_tensor
from onnxslim_llm.rewrite.edit import Builder, remove_dead
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.rule import Refusal

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["FoldRotaryTables"]


@dataclass(frozen=True)
class FoldRotaryTables(Pass):
    """Look up the cosines and sines of rotary embeddings by position in constant tables.

    Only if they are proved to be a function of each token's position alone, and the number of positions is known: from
    a table that the model looks up in already, or given as `positions`. For positions within the table the results are
    the same; a position beyond it, or a negative one, is an error of the runtime (index out of bounds), never a wrong
    answer. A model that computes its angles works for any position before, and for `positions` of them afterwards.

    Before:
        p = Unsqueeze <axes = [1]> (position_ids)
        f = Cast <to = 1> (p)
        angles = Transpose <perm = [0, 2, 1]> (MatMul (inv_freq, f))
        Y = onnxslim_llm.RotaryHalf <num_heads = 4, rotary_dim = 16> (X, Cos (angles), Sin (angles))
    After:
        at = Where (Less (position_ids, 0), 4096, position_ids)
        Y = onnxslim_llm.RotaryHalf <num_heads = 4, rotary_dim = 16> (X, Gather (cosines, at), Gather (sines, at))

    Skips when:
        - the tables depend on something else than positions, or a row on the positions of other tokens (scaling that
          depends on the length of the text);
        - the number of positions is not known;
        - the tables would take more than `max_share` of the weights, unless they replace a table of at least that size;
        - the cosines or sines are looked up in a constant already.

    Attributes:
        positions: Number of positions, if the model does not say it: the longest text, cache included. 0: not known.
        max_share: Size that the tables may have in addition, as a part of that of all weights.
    """

    name: ClassVar[str] = "fold_rotary_tables"
    group: ClassVar[str] = "fuse"

    positions: int = 0
    max_share: float = 0.01

    def __post_init__(self) -> None:
        if self.positions < 0:
            raise UsageError(f"positions is {self.positions}", where=self.name, todo="give a number of tokens, or 0")
        if not self.max_share >= 0:
            raise UsageError(f"max_share is {self.max_share}", where=self.name, todo="give a part, such as 0.01")

    def apply(self, model: Model, context: Context) -> Change:
        """Fold the tables of each graph; rotary embeddings that share theirs still do."""
        change = Change()
        sites: dict[tuple[int, ...], list[gs.Node]] = {}
        graphs: dict[int, gs.Graph] = {}
        for graph, node in calls(model, *ROTARY.values()):
            graphs[id(graph)] = graph
            sites.setdefault((id(graph), id(node.inputs[1]), id(node.inputs[2])), []).append(node)
        if not sites:
            return change
        work = _Work(model, infer_shapes(model), self.positions, self.max_share)
        for (graph_id, _, _), nodes in sites.items():
            cosines, sines = nodes[0].inputs[1:]
            if all(_is_lookup(table) for table in (cosines, sines)):
                change.skip(cosines.name, "it is looked up in a constant already")
                continue
            done = work.fold(graphs[graph_id], nodes)
            if done is None:
                change.sites.append(cosines.name)
            else:
                change.skip(cosines.name, f"{done.reason} at '{done.culprit}'")
        return change


def _is_lookup(tensor: gs.Tensor) -> bool:
    node = producer(tensor)
    return constant_tensor(tensor) is not None or (
        node is not None and node.op == "Gather" and constant_tensor(node.inputs[0]) is not None
    )


class _Work:
    def __init__(self, model: Model, values: SymbolicValues, count: int, share: float) -> None:
        self._model = model
        self._values = values
        self._count = count
        self._share = share
        self._weights = model.weight_bytes()
        self._checked: dict[tuple[int, int], gs.Tensor] = {}

    def fold(self, graph: gs.Graph, nodes: list[gs.Node]) -> Refusal | None:
        """Fold the tables that `nodes` share; return why not, or None."""
        tables: list[PositionTable] = []
        sources: list[gs.Tensor] = []
        for tensor in nodes[0].inputs[1:]:
            positions = find_positions(tensor)
            if isinstance(positions, Refusal):
                return positions
            table = tabulate(tensor, positions, self._count, self._model.opset() or 1)
            if isinstance(table, Refusal):
                return table
            sources.append(positions)
            tables.append(table)
        size = sum(table.rows.nbytes for table in tables)
        spared = sum(weight_of(constant).nbytes for constant in {id(c): c for t in tables for c in t.indexed}.values())
        if size > spared + self._share * self._weights:
            what = f"the tables would take {size} bytes, more than {self._share:g} of the weights"
            return Refusal(what, nodes[0].inputs[1].name)
        self._replace(graph, nodes, sources, tables)
        return None

    def _replace(
        self, graph: gs.Graph, nodes: list[gs.Node], sources: list[gs.Tensor], tables: list[PositionTable]
    ) -> None:
        first = next(i for i, node in enumerate(graph.nodes) if any(node is user for user in nodes))
        old = list(nodes[0].inputs[1:])
        op = Builder(self._model, nodes[0].name or nodes[0].outputs[0].name)
        for slot, (before, positions, table) in enumerate(zip(old, sources, tables, strict=True), start=1):
            rows = op.constant(table.rows, f"{before.name}/table")
            new = op.Gather(rows, self._within(op, graph, positions, table), axis=0)
            new.dtype, new.inferred = before.dtype, True
            for node in nodes:
                node.inputs[slot] = new
        graph.nodes[first:first] = op.nodes
        gone = {id(n) for n in remove_dead((n for t in old for n in t.inputs), graph_output_ids(self._model))}
        for scope in self._model.graphs():
            scope.nodes[:] = [node for node in scope.nodes if id(node) not in gone]

    def _within(self, op: Builder, graph: gs.Graph, positions: gs.Tensor, table: PositionTable) -> gs.Tensor:
        """Return positions [B or 1, S] of which a negative one is out of bounds: Gather would count it from the end."""
        key = (id(graph), id(positions))
        if key not in self._checked:
            at = positions
            if not table.indexed and not self._is_range(positions):
                dtype = np.dtype(positions.dtype)
                at = op.Where(op.Less(at, np.array(0, dtype)), np.array(len(table.rows), dtype), at)
            self._checked[key] = op.Unsqueeze(at, [0]) if len(positions.shape or ()) == 1 else at
        return self._checked[key]

    def _is_range(self, positions: gs.Tensor) -> bool:
        """Return whether positions count up from a size, so that none is negative."""
        node = producer(positions)
        if node is None or node.op != "Range":
            return False
        start, step = (self._values.value_of(node.inputs[i]) for i in (0, 2))
        if start is None or step is None or start.item() is None or step.item() is None:
            return False
        return is_nonnegative(start.item()) and is_nonnegative(step.item())
