"""Leave out the blocks of a transformer that change the residual stream least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.ir.topology import sort_nodes
from onnxslim_llm.ir.weights import ArrayWeight
from onnxslim_llm.passes.prune.blocks.block_scores import StreamChanges, StreamFit
from onnxslim_llm.passes.prune.blocks.cut_blocks import cut_blocks
from onnxslim_llm.products.attention import is_core
from onnxslim_llm.products.blocks import ResidualBlock, find_blocks
from onnxslim_llm.products.owned_weights import Constants, Product
from onnxslim_llm.products.writers import writer_of
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.stage import Stage

__all__ = ["RemoveBlocks"]

#: Rows of a product that is fitted: two matrices of K x K float64 are held, 2.4 GB for this K.
LARGEST_FIT = 12_288


@dataclass(frozen=True)
class RemoveBlocks(Pass):
    """Leave out whole blocks, attention and feed-forward layer, and let the product before them do part of their work.

    The blocks whose result is most like what they begin with go: 1 - cos(x, x'), the mean over the tokens of the
    calibration data (ShortGPT, arXiv 2403.03853). Their KV caches go with them; those that are left take the names of
    the first ones, since runtimes number layers from 0 on. The product that writes to the residual stream right before
    a gap is fitted to what the blocks added (least squares; judged on samples that were held out).

    Before:
        X1 = Add (X0, F (X0, past_key_values.0.key, ...))
        X2 = Add (X1, G (X1, past_key_values.1.key, ...))
        X3 = Add (X2, H (X2, past_key_values.2.key, ...))
    After:
        X1 = Add (X0, F (X0, past_key_values.0.key, ...))
        X3 = Add (X1, H (X1, past_key_values.1.key, ...))

    Skips when:
        - what an attention and the layers behind it make is not added to what was there before;
        - a norm stands in the residual stream itself (post-norm: BERT), or the model attends to another one's states;
        - something inside of the block is read outside of it, or is an output of the model;
        - its cache is computed or read elsewhere in the model;
        - `refit` is on, and no product with a weight of its own, of at most 12,288 rows, writes right before the gap:
          nothing is fitted.

    Attributes:
        count: How many go; at least one of those that could go stays.
        blocks: Instead: the numbers of those that go, counted from 0 among the blocks that could go.
        refit: Fit the product before each gap.
    """

    name: ClassVar[str] = "remove_blocks"
    group: ClassVar[str] = "prune"
    lossless: ClassVar[bool] = False
    structural: ClassVar[bool] = True
    stage: ClassVar[Stage] = Stage.PRUNE

    count: int = 1
    blocks: tuple[int, ...] = ()
    refit: bool = True

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"count = {self.count} is not possible", where=self.name, todo="choose 1 or more")
        if len(set(self.blocks)) != len(self.blocks) or any(number < 0 for number in self.blocks):
            what = f"blocks = {list(self.blocks)} are no different numbers from 0 on"
            raise UsageError(what, where=self.name, todo="give each block once, such as blocks=[3, 5]")

    def requires(self, model: Model, context: Context) -> None:
        """Check that the model can be observed where that is needed.

        Raises:
            UsageError: It cannot.
        """
        if context.observer is None and (self.refit or not self.blocks):
            todo = "run it as part of a compile, or choose blocks=[...] and refit=false"
            raise UsageError("blocks are compared on calibration data, and there are none", where=self.name, todo=todo)

    def apply(self, model: Model, context: Context) -> Change:
        """Choose the blocks and take them out; what is fitted is computed now.

        Raises:
            UsageError: There are not so many blocks.
        """
        change = Change()
        sort_nodes(model.graph)
        infer_shapes(model)
        found = find_blocks(model, change)
        if not found:
            return change
        self._check(len(found))
        scores = self._scores(model, context, found)
        gone = sorted(self.blocks or sorted(range(len(found)), key=scores.__getitem__)[: self.count])
        gaps = _gaps([found[i] for i in gone])
        fitted = self._fit(model, context, gaps, change) if self.refit else []
        attentions = [node for node in model.graph.nodes if is_core(node)]
        layers = [next(n for n, node in enumerate(attentions) if node is found[i].attention) for i in gone]
        cut_blocks(model, context, gaps)
        change.sites += [found[i].name for i in gone]
        change.detail.update(
            blocks={"before": len(found), "gone": gone, "scores": [round(score, 6) for score in scores]},
            config={"num_hidden_layers": len(attentions) - len(gone), "layers_gone": layers},
            fitted=fitted,
        )
        infer_shapes(model)
        return change

    def _check(self, total: int) -> None:
        if self.blocks and max(self.blocks) >= total:
            todo = f"choose numbers from 0 to {total - 1}"
            raise UsageError(f"there is no block {max(self.blocks)} that could go", where=self.name, todo=todo)
        if (len(self.blocks) or self.count) >= total:
            what = f"{len(self.blocks) or self.count} of {total} blocks cannot go"
            todo = f"leave out {total - 1} at most" if total > 1 else "leave this pass out of the recipe"
            raise UsageError(what, where=self.name, todo=todo)

    def _scores(self, model: Model, context: Context, blocks: Sequence[ResidualBlock]) -> list[float]:
        if context.observer is None:
            return []
        watch = StreamChanges([(block.before.name, block.after.name) for block in blocks])
        context.observer.observe(model, watch.collectors())
        return watch.scores

    def _fit(
        self, model: Model, context: Context, gaps: Sequence[Sequence[ResidualBlock]], change: Change
    ) -> list[dict[str, Any]]:
        """Change the product before each gap; return what that is worth."""
        assert context.observer is not None
        constants = Constants(model)
        places: list[tuple[Product, Sequence[ResidualBlock]]] = []
        for gap in gaps:
            product = writer_of(constants, gap[0].before)
            if isinstance(product, str):
                change.skip(gap[0].name, f"nothing is fitted in its place: {product}")
            elif product.rows > LARGEST_FIT:
                reason = f"'{product.name}' has {product.rows} rows, more than {LARGEST_FIT}"
                change.skip(gap[0].name, f"nothing is fitted in its place: {reason}")
            else:
                places.append((product, gap))
        if not places:
            return []
        names = [(product.node.inputs[0].name, gap[0].before.name, gap[-1].after.name) for product, gap in places]
        watch = StreamFit(names, [(product.rows, product.columns) for product, _ in places])
        context.observer.observe(model, watch.collectors())
        entries = []
        for number, (product, _) in enumerate(places):
            added, figures = watch.solution(number)
            weight = product.weight.load()
            result = weight + (added if product.k_axis == 0 else added.T)
            product.constant.values = ArrayWeight(result.astype(weight.dtype))
            entries.append({"name": product.name, **figures})
        return entries


def _gaps(blocks: Sequence[ResidualBlock]) -> list[list[ResidualBlock]]:
    """Return blocks in runs that follow each other without anything between."""
    gaps: list[list[ResidualBlock]] = []
    for block in blocks:
        if gaps and gaps[-1][-1].after is block.before:
            gaps[-1].append(block)
        else:
            gaps.append([block])
    return gaps
