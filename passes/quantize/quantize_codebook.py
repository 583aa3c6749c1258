"""Write weight matrices as entries of small tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.concepts.concept import replace_nodes
from onnxslim_llm.errors import UsageError, did_you_mean
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.ir.weights import constant
from onnxslim_llm.ir.weights.jobs import DerivedWeight, derive
from onnxslim_llm.passes.quantize.codebook.books import FIXED_BOOKS
from onnxslim_llm.passes.quantize.codebook.codebook_job import CodebookJob
from onnxslim_llm.passes.quantize.codebook.form import BookForm, BookKind
from onnxslim_llm.products.selection import compile_patterns
from onnxslim_llm.products.sites import Site, WeightGroup, find_groups
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.edit import Builder, detach, remove_dead
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.stage import Stage

__all__ = ["QuantizeCodebook"]

_KINDS: tuple[BookKind, ...] = (*FIXED_BOOKS, "kmeans", "vectors")
_LONGEST = 16
_MOST_STAGES = 4
_FLOATS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


@dataclass(frozen=True)
class QuantizeCodebook(Pass):
    """Store weights as bytes that name entries of a table: 16 numbers that fit their distribution, or short vectors.

    Only Gather is needed, so every runtime computes with the result. None has a kernel for it: the weight is put
    together when the model is loaded, or in each run, and products take the time and memory that they take in float.
    Files get small; for speed, use quantize_weights.

    Before:
        Y = MatMul (X, W[K, N])
    After:
        i = Cast <to = 6> (W_codes[N, K / d])
        v = Gather (W_table[256, d], i)
        b = Reshape (v, [N, K / block, block])
        w = Mul (b, W_scale[N, K / block, 1])
        t = Transpose (Reshape (w, [N, K]))
        Y = MatMul (X, t)

    Skips when:
        - quantize_weights would skip the weight for one of its reasons, such as a second reader, or its element type;
        - K is no multiple of the block;
        - a name matches `exclude`, or the weight is smaller than `min_elements`;
        - the tables would take more than `max_overhead` of the codes' bytes.

    Attributes:
        codebook: "nf4", "fp4" and "log2" are fixed tables of 16 numbers, see `books`; "kmeans" fits the 16 numbers to
            each weight; "vectors" fits 256 vectors to it.
        length: Weights in a vector: 2 makes 4 bits a weight, 4 makes 2, each times `stages`.
        stages: Tables of vectors that are added, each coding what is left by those before it; 1 to 4.
        block: Weights along K that share a scale; 0 for all. A multiple of `length`.
        method: "search" codes by the weight alone; "calibrated" by calibration data, each column in the way that is
            best on samples that were held out.
        tables: Also code embedding tables, and classifiers that share their weight.
        max_overhead: Largest share of a table's bytes by those of the codes.
        min_elements: Smaller weights are left alone.
        exclude: Regular expressions; weights with a match in their own name or in that of a reader are left alone.
    """

    name: ClassVar[str] = "quantize_codebook"
    group: ClassVar[str] = "quantize"
    lossless: ClassVar[bool] = False
    stage: ClassVar[Stage] = Stage.QUANTIZE

    codebook: BookKind = "kmeans"
    length: int = 4
    stages: int = 1
    block: int = 64
    method: Literal["search", "calibrated"] = "search"
    tables: bool = False
    max_overhead: float = 0.25
    min_elements: int = 4096
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = self.name
        if self.codebook not in _KINDS:
            todo = did_you_mean(str(self.codebook), list(_KINDS)) or f"choose one of {', '.join(_KINDS)}"
            raise UsageError(f"there is no codebook '{self.codebook}'", where=f"{where}.codebook", todo=todo)
        if self.method not in ("search", "calibrated"):
            todo = "choose search or calibrated"
            raise UsageError(f"method = '{self.method}' is not possible", where=f"{where}.method", todo=todo)
        for option, least, most in (("length", 1, _LONGEST), ("stages", 1, _MOST_STAGES)):
            value = getattr(self, option)
            if not least <= value <= most:
                what = f"{option} = {value} is not possible"
                raise UsageError(what, where=f"{where}.{option}", todo=f"choose {least} to {most}")
        if self.block < 0 or self.block % self._length:
            what = f"block = {self.block} is no multiple of the {self._length} weights that a code stands for"
            raise UsageError(what, where=f"{where}.block", todo=f"choose 0 or a multiple of {self._length}")
        if self.max_overhead < 0:
            raise UsageError(
                f"max_overhead = {self.max_overhead} is not possible", where=where, todo="choose 0 or more"
            )
        compile_patterns(self.exclude, f"{where}.exclude")

    @property
    def _length(self) -> int:
        return self.length if self.codebook == "vectors" else 2

    @property
    def wants_statistics(self) -> bool:
        """Whether calibration data are needed."""
        return self.method == "calibrated"

    def requires(self, model: Model, context: Context) -> None:
        """Check that there are data where they are needed.

        Raises:
            UsageError: There are none.
        """
        if self.wants_statistics:
            context.need_statistics("method 'calibrated' needs calibration data", self.name, "method=search")

    def apply(self, model: Model, context: Context) -> Change:
        """Replace the weights; they are coded at save."""
        change = Change()
        infer_shapes(model)
        exclude = compile_patterns(self.exclude, self.name)
        outputs = graph_output_ids(model)
        replaced: dict[int, list[gs.Node]] = {}
        removed: list[gs.Node] = []
        entries, stored, elements = [], 0, 0
        for group in find_groups(model, change):
            names = [group.name, *(site.node.name for site in group.sites)]
            pattern = next((p.pattern for p in exclude if any(p.search(name) for name in names)), None)
            form = self._form(group)
            reason = f"it is excluded by '{pattern}'" if pattern is not None else self._reason(group, form)
            if reason:
                change.skip(group.name, reason)
                continue
            moments = context.statistics.of_weight(group.name) if context.statistics and self.wants_statistics else None
            if moments is not None and (moments.size != group.rows or "embedding" in group.roles):
                moments = None
            if self.wants_statistics and moments is None:
                change.skip(group.name, "no calibration data reach it: coded by the weight alone")
            weights = derive(CodebookJob(group.source, group.k_axis, form, group.name, moments))
            for graph_id in dict.fromkeys(id(site.graph) for site in group.sites):
                coded = _Coded(model, group, form, weights)
                for site in (site for site in group.sites if id(site.graph) == graph_id):
                    coded.replace(site, replaced, removed, outputs)
            change.sites.append(group.name)
            size = sum(weight.nbytes for weight in weights)
            stored, elements = stored + size, elements + group.source.size
            bits = round(8 * size / group.source.size, 3)
            entries.append({"name": group.name, "bits_per_weight": bits, "bytes": [group.source.nbytes, size]})
        replace_nodes(model, replaced)
        if entries:
            change.detail.update(bits_per_weight=round(8 * stored / elements, 3), bytes=stored, tensors=entries)
            infer_shapes(model)
        return change

    def _form(self, group: WeightGroup) -> BookForm:
        stages = self.stages if self.codebook == "vectors" else 1
        return BookForm(self.codebook, self._length, stages, self.block or group.rows)

    def _reason(self, group: WeightGroup, form: BookForm) -> str:
        if group.source.size < self.min_elements:
            return f"{group.source.size} elements, fewer than min_elements = {self.min_elements}"
        if "embedding" in group.roles and not self.tables:
            return "it is an embedding table: set tables=true to code it, too"
        if group.rows % form.block or form.block % form.length:
            return f"K = {group.rows} is no multiple of the block of {form.block} weights"
        codes = form.stages * 8 / form.length
        overhead = (form.stored_bits(group.rows, group.columns) - codes - 16 / form.block) / codes
        if overhead > self.max_overhead:
            return f"its tables would add {overhead:.0%} to its codes, more than max_overhead = {self.max_overhead:.0%}"
        return ""


class _Coded:
    """The constants of one weight in one graph, and the nodes that put it together."""

    def __init__(self, model: Model, group: WeightGroup, form: BookForm, weights: tuple[DerivedWeight, ...]) -> None:
        self.model, self.group, self.form = model, group, form
        stages, name = form.stages, group.name
        suffixes = [f"_{i}" if stages > 1 else "" for i in range(stages)]
        hints = [*(f"{name}_codes{s}" for s in suffixes), f"{name}_scale", *(f"{name}_table{s}" for s in suffixes)]
        made = [constant(model.fresh_name(hint), weight) for hint, weight in zip(hints, weights, strict=True)]
        self.codes, self.scale, self.tables = made[:stages], made[stages], made[stages + 1 :]
        self._matrix: dict[str, gs.Variable] = {}

    def replace(
        self, site: Site, replaced: dict[int, list[gs.Node]], removed: list[gs.Node], outputs: set[int]
    ) -> None:
        """Let a site read the coded weight."""
        node = site.node
        op = Builder(self.model, node.name or node.outputs[0].name)
        if node.op == "Gather":
            indices, result = node.inputs[1], node.outputs[0]
            old = node.inputs[0]
            detach(node)
            self._looked_up(op, indices, site)
            op.nodes[-1].outputs[0] = result
            replaced[id(node)] = op.nodes
            removed.append(node)
        else:
            old = node.inputs[1]
            if site.computes_in not in self._matrix:
                self._matrix[site.computes_in] = self._whole(op, site)
            node.inputs[1] = self._matrix[site.computes_in]
            if node.op == "Gemm":
                node.attrs["transB"] = 0
            if op.nodes:
                replaced[id(node)] = [*op.nodes, node]
        if isinstance(old, gs.Variable):
            for dead in remove_dead(old.inputs, outputs):
                replaced[id(dead)] = []
                removed.append(dead)

    def _whole(self, op: Builder, site: Site) -> gs.Variable:
        """Return W[K, N]."""
        rows, columns, block = self.group.rows, self.group.columns, self.form.block
        vectors = self._vectors(op, list(self.codes), site)
        blocks = op.Reshape(vectors, np.array([columns, rows // block, block], np.int64))
        scaled = op.Reshape(op.Mul(blocks, _cast(op, self.scale, site)), np.array([columns, rows], np.int64))
        result: gs.Variable = op.Transpose(scaled, perm=[1, 0])
        return result

    def _looked_up(self, op: Builder, indices: gs.Tensor, site: Site) -> gs.Variable:
        """Return rows of the table [N, K] at `indices`."""
        rows, block, rank = self.group.rows, self.form.block, len(indices.shape)
        vectors = self._vectors(op, [op.Gather(codes, indices) for codes in self.codes], site)
        blocks = op.Reshape(vectors, np.array([0] * rank + [rows // block, block], np.int64))
        scale = _cast(op, op.Gather(self.scale, indices), site)
        result: gs.Variable = op.Reshape(op.Mul(blocks, scale), np.array([0] * rank + [rows], np.int64))
        return result

    def _vectors(self, op: Builder, codes: list[gs.Tensor], site: Site) -> gs.Variable:
        total = None
        for stage, table in zip(codes, self.tables, strict=True):
            values = op.Gather(_cast(op, table, site), op.Cast(stage, to=TensorProto.INT32))
            total = values if total is None else op.Add(total, values)
        assert total is not None
        return total


def _cast(op: Builder, tensor: gs.Tensor, site: Site) -> gs.Tensor:
    if site.computes_in == "float16":
        return tensor
    result: gs.Tensor = op.Cast(tensor, to=_FLOATS[site.computes_in])
    return result
