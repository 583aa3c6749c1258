"""Split weights that are really tensors, stacked experts and convolutions, into smaller ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.concepts.concept import replace_nodes
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.ownership import is_overridable
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.ir.weights import constant, weight_of
from onnxslim_llm.ir.weights.jobs import derive
from onnxslim_llm.ir.weights.sparse import SparseWeight
from onnxslim_llm.passes.lowrank.tensor_decomposition import mode_spectrum
from onnxslim_llm.passes.lowrank.tensor_job import Decomposition, TensorFactorJob, TensorLayout, experts, kernel
from onnxslim_llm.products.selection import compile_patterns
from onnxslim_llm.rewrite.edit import Builder, detach
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.schema import normal_domain
from onnxslim_llm.rewrite.stage import Stage

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.ir.weights.weight import Weight
    from onnxslim_llm.rewrite.context import Context

__all__ = ["FactorTensors"]

Array = NDArray[Any]

_FLOATS = ("float32", "float16", "bfloat16", "float64")
_MATRICES = 3  # axes of stacked matrices


@dataclass(frozen=True)
class FactorTensors(Pass):
    """Replace weights with three or more axes by the factors of their Tucker or CP decomposition.

    Tucker gives all experts, or all places of a kernel, one basis of input and one of output channels, with small
    matrices between; CP makes these diagonal. For a matrix both are the singular value decomposition: that is
    `split_low_rank`. The approximation is the closest in the weight; calibration data are not used.

    Before:
        Y = MatMul (X, W[E, K, N])
        Z = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (P, F[O, I, 3, 3], b)
    After:
        Y = MatMul (MatMul (MatMul (X, U[K, r]), G[E, r, s]), V[s, N])
        p = Conv (P, U[r, I, 1, 1])
        q = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (p, G[s, r, 3, 3])
        Z = Conv (q, V[O, s, 1, 1], b)

    Skips when:
        - the factors would not be smaller;
        - the kernel has one place, so that it is a matrix, or the convolution has groups;
        - the weight of MatMul has two axes, or more than three;
        - with cp, the rank of the other operand of MatMul is unknown, or it is a vector;
        - it has fewer than `min_elements` elements, or its name or that of its reader matches `exclude`;
        - it is used elsewhere, too, is sparse, quantized already, no float, a graph output, or may be replaced.

    Attributes:
        method: "tucker" or "cp".
        ratio: Share of the parameters that the factors may have, more than 0 and less than 1.
        align: Ranks are multiples of this, where that leaves any.
        min_elements: Smaller weights are left alone.
        exclude: Regular expressions; weights with a match in their own name or in that of a reader are left alone.
    """

    name: ClassVar[str] = "factor_tensors"
    group: ClassVar[str] = "lowrank"
    lossless: ClassVar[bool] = False
    stage: ClassVar[Stage] = Stage.SPLIT

    method: Decomposition = "tucker"
    ratio: float = 0.5
    align: int = 4
    min_elements: int = 4096
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            todo = "choose more than 0 and less than 1, such as 0.5"
            raise UsageError(f"ratio = {self.ratio:g} is not possible", where=self.name, todo=todo)
        if self.align < 1:
            raise UsageError(f"align = {self.align} is not possible", where=self.name, todo="choose 1 or more")
        compile_patterns(self.exclude, f"{self.name}.exclude")

    def apply(self, model: Model, context: Context) -> Change:
        """Choose the ranks and replace the operators; the factors are computed at save."""
        change = Change()
        infer_shapes(model)
        outputs = graph_output_ids(model)
        uses: Counter[Hashable] = Counter(weight_of(c).storage_key for c in model.constants())
        exclude = compile_patterns(self.exclude, self.name)
        replaced: dict[int, list[gs.Node]] = {}
        removed: list[gs.Node] = []  # keeps them alive, so that their ids stay theirs
        entries = []
        for graph in model.graphs():
            for node in graph.nodes:
                layout, reason = _layout(node)
                if layout is None and not reason:
                    continue
                tensor = node.inputs[1]
                weight, name = weight_of(tensor), str(tensor.name)
                pattern = next((p.pattern for p in exclude if p.search(name) or p.search(node.name)), None)
                if pattern is not None:
                    reason = f"it is excluded by '{pattern}'"
                elif is_overridable(tensor) or id(tensor) in outputs:
                    reason = "it is an input or output of the model"
                elif uses[weight.storage_key] > 1 or len(tensor.outputs) > 1:
                    reason = "it is used elsewhere, too"
                elif weight.size < self.min_elements:
                    reason = f"{weight.size} elements, fewer than min_elements = {self.min_elements}"
                elif layout is not None and layout.kind == "experts" and self.method == "cp":
                    reason = "" if len(node.inputs[0].shape or ()) > 1 else "the rank of the other operand is unknown"
                ranks = self._ranks(layout, weight) if layout is not None and not reason else None
                if layout is None or ranks is None:
                    change.skip(name, reason or f"no factors have only {self.ratio:g} of its parameters")
                    continue
                replaced[id(node)] = self._replace(model, node, layout, ranks)
                removed.append(node)
                change.sites.append(name)
                parameters = [weight.size, layout.parameters(self.method, ranks)]
                entry = {"name": name, "shape": list(weight.shape), "ranks": list(ranks), "parameters": parameters}
                entries.append(entry)
        replace_nodes(model, replaced)
        if entries:
            change.detail.update(method=self.method, tensors=entries)
        return change

    def _ranks(self, layout: TensorLayout, weight: Weight) -> tuple[int, int] | None:
        """Return the ranks of input and output channels; None if there are none that are small enough."""
        limit = self.ratio * weight.size
        m, i, o = layout.sizes
        if self.method == "cp":
            rank = int(limit / (m + i + o))
            return (self._aligned(rank),) * 2 if rank else None
        tensor = layout.tensor(weight.view())
        weight.release()
        # What is left away along each mode bounds the error: find the pair of ranks that leaves least.
        lost = [np.append(s[::-1].cumsum()[::-1], 0.0) for s in (mode_spectrum(tensor, 1), mode_spectrum(tensor, 2))]
        best: tuple[float, tuple[int, int]] | None = None
        for first in sorted({*range(self.align, i + 1, self.align), 1, i}):
            last = min(o, int((limit - first * i) / (m * first + o)))
            last = self._aligned(last) if last < o else o
            if last < 1:
                continue
            bound = float(lost[0][first] + lost[1][last])
            if best is None or bound < best[0]:
                best = (bound, (first, last))
        return best[1] if best is not None else None

    def _aligned(self, rank: int) -> int:
        return rank // self.align * self.align or rank

    def _replace(self, model: Model, node: gs.Node, layout: TensorLayout, ranks: tuple[int, int]) -> list[gs.Node]:
        tensor = node.inputs[1]
        job = TensorFactorJob(weight_of(tensor), layout, self.method, ranks, tensor.name)
        inner, core, outer = (
            constant(model.fresh_name(f"{tensor.name}_{part}"), factor)
            for part, factor in zip(("in", "core", "out"), derive(job), strict=True)
        )
        inputs, result, attributes = list(node.inputs), node.outputs[0], dict(node.attrs)
        op = Builder(model, node.name or result.name)
        detach(node)
        if layout.kind == "experts":
            middle = (op.Mul if self.method == "cp" else op.MatMul)(op.MatMul(inputs[0], inner), core)
            op.MatMul(middle, outer)
        else:
            attributes["group"] = ranks[0] if self.method == "cp" else 1
            middle = op.Conv(op.Conv(inputs[0], inner), core, **attributes)
            op.Conv(middle, outer, *inputs[2:])
        op.nodes[-1].outputs[0] = result
        return op.nodes


def _layout(node: gs.Node) -> tuple[TensorLayout | None, str]:
    """Return how a node's weight is a tensor, or why it is none; neither if it has no weight at all."""
    if normal_domain(node.domain) != "" or node.op not in ("MatMul", "Conv") or len(node.inputs) < 2:
        return None, ""
    tensor = node.inputs[1]
    if not isinstance(tensor, gs.Constant):
        return None, ""
    weight = weight_of(tensor)
    axes = len(weight.shape)
    if axes < _MATRICES:
        return None, "it is a matrix: Tucker and CP are the singular value decomposition then" if axes == 2 else ""
    if isinstance(weight, SparseWeight) or str(weight.dtype) not in _FLOATS:
        return None, "it is no dense float weight"
    if node.op == "MatMul":
        return (experts(weight.shape), "") if axes == _MATRICES else (None, f"it has {axes} axes")
    if node.attrs.get("group", 1) != 1:
        return None, f"the convolution has {node.attrs['group']} groups"
    layout = kernel(weight.shape)
    return (layout, "") if layout.sizes[0] > 1 else (None, "its kernel has one place: it is a matrix")
