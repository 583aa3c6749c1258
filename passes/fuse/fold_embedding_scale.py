"""The factor of an embedding becomes part of its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim_llm.ir.ownership import is_overridable
from onnxslim_llm.ir.weights import Weight, constant, weight_of
from onnxslim_llm.ir.weights.jobs import TensorSpec, Tile, TileOutput, WeightJob, derive
from onnxslim_llm.ir.weights.sparse import SparseWeight
from onnxslim_llm.rewrite.constants import constant_value
from onnxslim_llm.rewrite.edit import Builder
from onnxslim_llm.rewrite.engine import apply_rules, graph_output_ids
from onnxslim_llm.rewrite.matcher import Match
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.pattern import PatternBuilder, Wildcard
from onnxslim_llm.rewrite.rule import Refusal, Rule

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context

__all__ = ["FoldEmbeddingScale", "ScaleJob"]

_TILE_BYTES = 32 << 20
_TYPES = ("float32", "float16")


@dataclass(frozen=True)
class FoldEmbeddingScale(Pass):
    """Multiply an embedding table once instead of everything that is looked up in it: Gemma's sqrt(hidden size).

    The product is rounded as before, so that the results are the same bits. The table is multiplied while it is
    written.

    Before:
        e = Gather (E, input_ids)
        h = Mul (e, scale)
    After:
        h = Gather (E_scaled, input_ids)

    Skips when:
        - the table is used elsewhere, too: a classifier that shares the weight would need a second copy
        - the factor is no single number of the table's type
        - the table is a graph input or output, stored sparse, or of another type than float32 and float16
        - what was looked up is used elsewhere, too.
    """

    name: ClassVar[str] = "fold_embedding_scale"
    group: ClassVar[str] = "fuse"

    def apply(self, model: Model, context: Context) -> Change:
        """Fold all factors."""
        return apply_rules(model, [_Scaled(model)])


class _Scaled(Rule):
    explain = True

    def __init__(self, model: Model) -> None:
        self._model = model
        self._outputs = graph_output_ids(model)

    @property
    def name(self) -> str:
        return "embedding scale"

    def pattern(self, op: PatternBuilder, table: Wildcard, ids: Wildcard) -> object:
        return op.Mul(op.Gather(op.const("table"), ids, axis=0, _name="gather"), op.const("scale"))

    def check(self, match: Match) -> Refusal | None:
        table = match["table"]
        if not isinstance(table, gs.Constant) or is_overridable(table) or id(table) in self._outputs:
            return Refusal("the table is no weight of the model's own", table.name)
        weight = weight_of(table)
        if isinstance(weight, SparseWeight) or str(weight.dtype) not in _TYPES or len(weight.shape) != 2:
            return Refusal("the table is no matrix of float32 or float16", table.name)
        scale = constant_value(match["scale"])
        if scale is None or scale.size != 1 or scale.ndim > 1 or scale.dtype != weight.dtype:
            return Refusal("the factor is no single number of the table's type", match["scale"].name)
        same = [c for c in self._model.constants() if weight_of(c).storage_key == weight.storage_key]
        if len(same) > 1 or len(table.outputs) > 1:
            return Refusal("the table is used elsewhere, too: it would be stored twice", table.name)
        return None

    def rewrite(self, op: Builder, match: Match) -> gs.Tensor:
        table, scale = match["table"], match.value("scale")
        assert isinstance(table, gs.Constant)
        assert scale is not None
        (scaled,) = derive(ScaleJob(weight_of(table), scale.reshape(()), table.name))
        looked_up: gs.Tensor = op.Gather(constant(op.model.fresh_name(f"{table.name}_scaled"), scaled), match["ids"])
        return looked_up


class ScaleJob(WeightJob):
    """A weight times a number.

    Args:
        source: float32 or float16.
        factor: Of the same type, without axes.
        name: For messages.
    """

    def __init__(self, source: Weight, factor: np.ndarray, name: str) -> None:
        self.inputs = (source,)
        self.outputs = (TensorSpec(source.shape, source.onnx_dtype),)
        self.fingerprint = f"scale v1 by {factor.dtype} {factor.tobytes().hex()}"
        self._factor, self._name = factor, name

    def where(self) -> str:
        """Return the name of the weight."""
        return self._name

    def tiles(self) -> Sequence[Tile]:
        """Return ranges of rows."""
        rows = self.inputs[0].shape[0]
        width = max(1, self.inputs[0].nbytes // max(1, rows))
        step = max(1, _TILE_BYTES // width)
        return [Tile(a, min(a + step, rows), 2 * width * min(step, rows - a)) for a in range(0, rows, step)]

    def run(self, tile: Tile) -> TileOutput:
        """Multiply a range of rows."""
        source = self.inputs[0]
        width = source.nbytes // source.shape[0]
        product = np.ascontiguousarray(source.view()[tile.start : tile.stop] * self._factor)
        start = tile.start * width
        return TileOutput([(0, start, product.view(np.uint8).reshape(-1))], reads=[(0, start, tile.stop * width)])
