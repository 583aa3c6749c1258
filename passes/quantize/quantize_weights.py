"""Store weight matrices in few bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim_llm.concepts.block_weights import BLOCK_GATHER, BLOCK_MATMUL, Method, WeightScheme
from onnxslim_llm.concepts.concept import follow_opset, replace_nodes
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.opset import convert_opset
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.ir.weights import Weight, constant
from onnxslim_llm.ir.weights.jobs import derive
from onnxslim_llm.passes.quantize.calibrated_job import CalibratedJob
from onnxslim_llm.passes.quantize.job import QuantizeJob
from onnxslim_llm.passes.quantize.mixed_precision import FORMS, Demand, share_out, tied_ridge
from onnxslim_llm.passes.quantize.settings import (
    BITS,
    ScaleType,
    Settings,
    check_scheme,
    check_scopes,
    compile_patterns,
)
from onnxslim_llm.products.attention import SENSITIVE, Sensitive
from onnxslim_llm.products.sites import Site, WeightGroup, find_groups
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.edit import Builder, detach, remove_dead
from onnxslim_llm.rewrite.engine import graph_output_ids
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.stage import Stage

if TYPE_CHECKING:
    from onnxslim_llm.stats.statistics import Statistics

__all__ = ["LONG_BLOCK", "QuantizeWeights"]

#: (opset, IR version) that brought the element types of codes.
_NEEDS = {2: (25, 13), 3: (21, 10), 4: (21, 10), 8: (21, 10)}
#: Weights that get more bits than the others have codes that are fine enough for long blocks.
LONG_BLOCK = 128
_SCALE_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Store the weights of matrix products and embeddings in 2, 3, 4 or 8 bits, with a scale per block.

    Blocks run along the axis that products sum over. The full range of codes is used, [-8, 7] for 4 bits. A weight with
    several readers is quantized once; a classifier that is tied to the embedding stays tied.

    Before:
        Y = MatMul (X, W)
        H = Gather (E, input_ids)
    After:
        Y = onnxslim_llm.BlockMatMul <block_size = 32, scale_type = 1> (X, W_q4, W_scale, )
        H = onnxslim_llm.BlockGather <block_size = 32, scale_type = 1> (input_ids, E_q8, E_scale, )

    Skips when:
        - the weight has fewer than `min_elements` elements, or a side below 16;
        - its name, or that of a node that reads it, matches `exclude`, or its bits are 0;
        - it has more than two dimensions, is sparse, or is of another type than float32, float16 or bfloat16;
        - it is computed with in bfloat16 or float64;
        - it is the left operand of the product, or Gemm transposes the right one's partner (transA = 1);
        - something else reads it as floats, so that it would be stored twice;
        - it is a graph output, or a graph input that the caller may replace;
        - it is quantized already, or holds the scales of something that is;
        - Gather looks up columns, a single row, or positions instead of tokens, or the rank of its indices is unknown;
        - it lies in the body of a model-local function or in a Constant node.

    Attributes:
        bits: Width of the codes: 2, 3, 4 or 8.
        block: Elements that share a scale: 16, 32, 64, 128, 256, or 0 for a whole column. Weights that get more than
            `bits` by their role have at least 128.
        symmetric: No zero points.
        method: "rtn" takes each block's range; "search" looks for the scale with the least squared error; "hqq" for
            that with the least sum of |error|^(1/2), by half-quadratic splitting: it gives up large weights for the
            others.
        embedding_bits: Bits of embedding tables; 0 leaves them alone. A table that is also the classifier's weight gets
            the larger of `embedding_bits` and `lm_head_bits`, or is left alone if either is 0.
        lm_head_bits: Bits of the product that makes the logits; 0 leaves it alone.
        sensitive_bits: Bits of the products that lose most by few bits; 0 leaves them alone.
        sensitive: Which ones these are: "value" makes the values of an attention, "output" brings its result back,
            "first_block" is all products up to the second attention.
        min_elements: Smaller weights are left alone.
        exclude: Regular expressions; weights with a match in their own name or in that of a reader are left alone.
        scopes: Other options by name: each entry has `match`, a regular expression as in `exclude`, and any of bits (0
            leaves alone), block, symmetric, method, scale_dtype. Later entries win.
        target_bits: Bits per weight, scales and zero points included, that all weights together may take; 0 leaves the
            choice to the other options. Otherwise bits and blocks are shared out so that the expected KL divergence is
            least, and `bits`, `block` and the options by role do not count, except that 0 leaves alone. Scopes that
            name bits or a block hold.
        widths: Bits that weights may get by `target_bits`; default: all that the target can store.
        scale_dtype: Type that scales are stored in: "activation" is that of the activations; "float16" saves
            16 / block bits a weight, and the runtime converts them when it loads the model.
    """

    name: ClassVar[str] = "quantize_weights"
    group: ClassVar[str] = "quantize"
    lossless: ClassVar[bool] = False
    stage: ClassVar[Stage] = Stage.QUANTIZE

    bits: int = 4
    block: int = 32
    symmetric: bool = False
    method: Method = "search"
    embedding_bits: int = 8
    lm_head_bits: int = 8
    sensitive_bits: int = 8
    sensitive: tuple[Sensitive, ...] = SENSITIVE
    min_elements: int = 4096
    exclude: tuple[str, ...] = ()
    scopes: tuple[dict[str, Any], ...] = ()
    scale_dtype: ScaleType = "float16"
    target_bits: float = 0.0
    widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        where = self.name
        check_scheme(self.options(), where)
        for option in ("embedding_bits", "lm_head_bits", "sensitive_bits"):
            check_scheme({"bits": getattr(self, option)}, f"{where}.{option}", may_be_left=True)
        for width in self.widths:
            check_scheme({"bits": width}, f"{where}.widths")
        if self.target_bits < 0:
            todo = "give the bits per weight, 4.5 say, or 0"
            raise UsageError(f"target_bits = {self.target_bits!r} is not possible", where=where, todo=todo)
        compile_patterns(self.exclude, f"{where}.exclude")
        check_scopes(self.scopes, where)

    def requires(self, model: Model, context: Context) -> None:
        """Check that the target can store what the options ask for.

        Raises:
            UsageError: It cannot.
        """
        if self.wants_statistics and context.statistics is None:
            todo = "give --calib FILE, --calib self (text sampled from the model), or another method"
            raise UsageError("method 'calibrated' needs calibration data", where=self.name, todo=todo)
        if context.target is None:
            return
        roles = {self.embedding_bits, self.lm_head_bits, self.sensitive_bits}
        usual = set(self.widths) if self.target_bits else {self.bits, *roles}
        asked = usual | {scope.get("bits", 0) for scope in self.scopes}
        missing = sorted(asked - {0} - set(context.target.weight_bits))
        if missing:
            can = ", ".join(map(str, context.target.weight_bits))
            what = f"target '{context.target.name}' cannot store weights of {missing[0]} bits"
            raise UsageError(what, where=self.name, todo=f"choose one of {can}, or another target")

    @property
    def wants_statistics(self) -> bool:
        """Whether any weight may be quantized by calibration data."""
        return "calibrated" in (self.method, *(scope.get("method") for scope in self.scopes))

    @property
    def wants_gains(self) -> bool:
        """Whether bits are shared out by what errors do to the answer."""
        return self.wants_statistics and self.target_bits > 0

    def apply(self, model: Model, context: Context) -> Change:
        """Replace the products and look-ups; the weight work itself is recorded and done at save.

        Raises:
            ModelError: The model cannot be converted to the opset that the codes need.
        """
        change = Change()
        infer_shapes(model)
        chosen = self._choose(model, change, context)
        if not chosen:
            return change
        opset, ir_version = (max(needs) for needs in zip(*(_NEEDS[s.bits] for _, s, _ in chosen), strict=True))
        if (model.opset() or 0) < opset:
            convert_opset(model, opset)
            follow_opset(model)
            change = Change(detail={"converted_to_opset": opset})
            chosen = self._choose(model, change, context)
        model.graph.ir_version = max(model.graph.ir_version or 0, ir_version)
        _Replacement(model, change, context.statistics).replace(chosen)
        return change

    def plan(self, model: Model, context: Context) -> dict[str, WeightScheme]:
        """Return how weights of the model as it is would be coded, by the initializers' names."""
        infer_shapes(model)
        return {group.name: scheme for group, scheme, _ in self._choose(model, Change(), context)}

    def _choose(self, model: Model, change: Change, context: Context) -> list[_Chosen]:
        exclude = compile_patterns(self.exclude, self.name)
        demands = []
        for group in find_groups(model, change):
            names = [group.name, *(site.node.name for site in group.sites)]
            settings = self._settings(group)
            scoped = settings.in_scopes(self.scopes, names)
            pattern = next((p.pattern for p in exclude if any(p.search(name) for name in names)), None)
            if pattern is not None:
                change.skip(group.name, f"it is excluded by '{pattern}'")
            elif group.source.size < self.min_elements:
                change.skip(group.name, f"{group.source.size} elements, fewer than min_elements = {self.min_elements}")
            elif scoped.bits == 0:
                change.skip(group.name, "its bits are set to 0")
            else:
                free = (scoped.bits, scoped.block) == (settings.bits, settings.block) and self.target_bits > 0
                demands.append(Demand(group, self._schemes(group, scoped, context, free=free)))
        if not self.target_bits:
            return [(demand.group, demand.schemes[0], {}) for demand in demands]
        schemes, accounts = share_out(demands, self.target_bits, context.statistics, self.name)
        return list(zip((d.group for d in demands), schemes, accounts, strict=True))

    def _schemes(
        self, group: WeightGroup, settings: Settings, context: Context, *, free: bool
    ) -> tuple[WeightScheme, ...]:
        allowed = self.widths or (context.target.weight_bits if context.target else BITS)
        forms = [form for form in FORMS if form[0] in allowed] if free else [(settings.bits, settings.block)]
        computes_in = group.sites[0].computes_in
        made = (
            replace(settings, bits=bits, block=block).scheme(group.rows, group.columns, computes_in)
            for bits, block in forms
        )
        return tuple(dict.fromkeys(made))

    def _settings(self, group: WeightGroup) -> Settings:
        linear = self.sensitive_bits if group.sensitive & set(self.sensitive) else self.bits
        by_role = {"embedding": self.embedding_bits, "lm_head": self.lm_head_bits, "linear": linear}
        widths = [by_role[role] for role in group.roles]
        bits = max(widths) if all(widths) else 0
        block = self.block if bits <= self.bits else max(self.block, LONG_BLOCK)
        return Settings(bits, block if self.block else 0, self.symmetric, self.method, self.scale_dtype)


_Chosen = tuple[WeightGroup, WeightScheme, dict[str, Any]]


class _Replacement:
    """Puts calls into the graphs, group by group, and all of them into place at the end."""

    def __init__(self, model: Model, change: Change, statistics: Statistics | None) -> None:
        self.model = model
        self.change = change
        self.statistics = statistics
        self.outputs = graph_output_ids(model)
        self.replaced: dict[int, list[gs.Node]] = {}
        self.removed: list[gs.Node] = []

    def replace(self, chosen: list[_Chosen]) -> None:
        stored: dict[Hashable, int] = {}
        tensors = []
        for group, scheme, account in chosen:
            job = self._job(group, scheme)
            derived = derive(job)
            # One set of constants per graph: ONNX Runtime does not fuse what a subgraph reads from the graph around it.
            codes: dict[int, list[gs.Constant | None]] = {}
            for site in group.sites:
                if id(site.graph) not in codes:
                    codes[id(site.graph)] = self._constants(group.name, scheme, derived)
                self._replace_site(site, job, codes[id(site.graph)])
            self.change.sites.append(group.name)
            stored.update((w.storage_key, w.nbytes) for w in derived)
            tensors.append(_entry(group, scheme, sum(w.nbytes for w in derived)) | account)
        replace_nodes(self.model, self.replaced)
        counts = Counter(str(entry["bits"]) for entry in tensors)
        elements = sum(group.source.size for group, _, _ in chosen)
        self.change.detail.update(
            weights_by_bits=dict(sorted(counts.items())),
            bits_per_weight=round(8 * sum(stored.values()) / elements, 3),
            bytes=sum(stored.values()),
            tensors=tensors,
        )

    def _job(self, group: WeightGroup, scheme: WeightScheme) -> QuantizeJob:
        if scheme.method == "calibrated":
            moments = self.statistics.of_weight(group.name) if self.statistics else None
            ridge = tied_ridge(group, self.statistics)
            if moments is not None and moments.size == group.rows and ("embedding" not in group.roles or ridge > 0):
                return CalibratedJob(group.source, group.k_axis, scheme, group.name, moments, ridge=ridge)
            if "embedding" not in group.roles:
                self.change.skip(group.name, "no calibration data reach it: quantized by search")
            scheme = replace(scheme, method="search")
        return QuantizeJob(group.source, group.k_axis, scheme, group.name)

    def _constants(self, name: str, scheme: WeightScheme, derived: tuple[Weight, ...]) -> list[gs.Constant | None]:
        names = (f"{name}_q{scheme.bits}", f"{name}_scale", f"{name}_zp")
        made: list[gs.Constant | None] = [
            constant(self.model.fresh_name(hint), weight) for hint, weight in zip(names, derived, strict=False)
        ]
        return made if len(made) == len(names) else [*made, None]

    def _replace_site(self, site: Site, job: QuantizeJob, codes: list[gs.Constant | None]) -> None:
        node = site.node
        inputs, outputs = list(node.inputs), list(node.outputs)
        attributes = {"block_size": job.stored_block, "scale_type": int(_SCALE_TYPES[site.computes_in])}
        gemm = dict(node.attrs) if node.op == "Gemm" else {}
        detach(node)
        self.removed.append(node)
        if node.op == "Gather":
            call = BLOCK_GATHER.call(self.model, node.name, [inputs[1], *codes], outputs, attributes)
            self.replaced[id(node)] = [call]
        else:
            call = BLOCK_MATMUL.call(self.model, node.name, [inputs[0], *codes], outputs, attributes)
            self.replaced[id(node)] = [call, *self._gemm_rest(call, inputs[2:], gemm, site)]
        weight = inputs[0 if node.op == "Gather" else 1]
        if isinstance(weight, gs.Variable):
            for dead in remove_dead(weight.inputs, self.outputs):
                self.replaced[id(dead)] = []
                self.removed.append(dead)

    def _gemm_rest(self, call: gs.Node, bias: list[gs.Tensor], attributes: dict[str, Any], site: Site) -> list[gs.Node]:
        """Return what Gemm does after its product: alpha * product + beta * bias."""
        alpha, beta = float(attributes.get("alpha", 1.0)), float(attributes.get("beta", 1.0))
        bias = [tensor for tensor in bias if not tensor.is_empty() and beta != 0.0]
        if alpha == 1.0 and not bias:
            return []
        result = call.outputs[0]
        op = Builder(self.model, call.name)
        value: gs.Tensor = gs.Variable(self.model.fresh_name(f"{call.name}/product"), result.dtype, result.shape)
        call.outputs[0] = value
        if alpha != 1.0:
            value = op.Mul(value, _scalar(alpha, site.computes_in))
        if bias:
            shift = bias[0] if beta == 1.0 else op.Mul(bias[0], _scalar(beta, site.computes_in))
            value = op.Add(value, shift)
        op.nodes[-1].outputs[0] = result
        return op.nodes


def _scalar(value: float, dtype: str) -> np.ndarray[Any, Any]:
    return np.array(value, dtype)


def _entry(group: WeightGroup, scheme: WeightScheme, nbytes: int) -> dict[str, Any]:
    return {
        "name": group.name,
        "roles": sorted(group.roles | group.sensitive),
        "shape": list(group.source.shape),
        "bits": scheme.bits,
        "block": scheme.block,
        "bytes": [group.source.nbytes, nbytes],
    }
