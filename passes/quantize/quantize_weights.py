"""Store weight matrices in few bits."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from onnxslim_llm.concepts.block_weights import WeightScheme
from onnxslim_llm.concepts.concept import follow_opset
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import Model
from onnxslim_llm.ir.opset import convert_opset
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.passes.quantize.bits.fast_forms import fast_forms
from onnxslim_llm.passes.quantize.bits.limits import Limits
from onnxslim_llm.passes.quantize.bits.mixed_precision import FORMS, Demand, share_out
from onnxslim_llm.passes.quantize.bits.speed import times_of
from onnxslim_llm.passes.quantize.bits.stored_size import storage_of
from onnxslim_llm.passes.quantize.codes.planes import PLANES
from onnxslim_llm.passes.quantize.codes.scale_range import half_holds_scales
from onnxslim_llm.passes.quantize.replacement import Chosen, Replacement
from onnxslim_llm.passes.quantize.settings import (
    BITS,
    PROBING,
    AccuracyOption,
    MethodOption,
    ScaleType,
    Settings,
    check_scheme,
    check_scopes,
)
from onnxslim_llm.products.attention import SENSITIVE, Sensitive
from onnxslim_llm.products.selection import compile_patterns
from onnxslim_llm.products.sites import WeightGroup, find_groups
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.rewrite.stage import Stage

__all__ = ["LONG_BLOCK", "QuantizeWeights"]

#: (opset, IR version) that brought the element types of codes.
_NEEDS = {2: (25, 13), 3: (21, 10), 4: (21, 10), 5: (25, 13), 6: (25, 13), 8: (21, 10)}
#: Limits of what all weights together take, and how to set them.
_LIMITS = {
    "target_bits": "give the bits per weight, 4.5 say, or 0",
    "target_ms": "give the milliseconds for a token, 5 say, or 0",
}
#: What these decide; 0 bits still leave weights alone.
_SHARED_OUT = frozenset({"bits", "block", "embedding_bits", "lm_head_bits", "sensitive_bits"})
#: Weights that get more bits than the others have codes that are fine enough for long blocks.
LONG_BLOCK = 128


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Store the weights of matrix products and embeddings in 2, 3, 4, 5, 6 or 8 bits, with a scale per block.

    Blocks run along the axis that products sum over. The full range of codes is used, [-8, 7] for 4 bits. Codes of 5
    and 6 bits are stored as their high bits and their two low ones, which makes two products and their sum: runtimes
    have no kernels for them. A weight with several readers is quantized once; a classifier that is tied to the
    embedding stays tied.

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
        bits: Width of the codes: 2, 3, 4, 5, 6 or 8; 5 and 6 are always symmetric.
        block: Elements that share a scale: 16, 32, 64, 128, 256, or 0 for a whole column. Weights that get more than
            `bits` by their role have at least 128.
        symmetric: No zero points.
        method: "rtn" takes each block's range; "search" looks for the scale with the least squared error; "hqq" for
            that with the least sum of |error|^(1/2), by half-quadratic splitting: it gives up large weights for the
            others; "calibrated" takes the coding of each column that is best on samples of the calibration data that
            were held out; "probed" is "calibrated" with the data that are given, or with text that the model writes
            itself, and "search" where it cannot be run or writes no text; "auto" is that, and "search" as well where
            no data are given and probing would take more than minutes.
        embedding_bits: Bits of embedding tables; 0 leaves them alone. A table that is also the classifier's weight gets
            the larger of `embedding_bits` and `lm_head_bits`, or is left alone if either is 0.
        lm_head_bits: Bits of the product that makes the logits; 0 leaves it alone.
        sensitive_bits: Bits of the products that lose most by few bits; 0 leaves them alone.
        sensitive: Which ones these are: "value" makes the values of an attention, "output" brings its result back,
            "first_block" is all products up to the second attention.
        min_elements: Smaller weights are left alone.
        exclude: Regular expressions; weights with a match in their own name or in that of a reader are left alone.
        scopes: Other options by name: each entry has `match`, a regular expression as in `exclude`, and any of bits (0
            leaves alone), block, symmetric, method, scale_dtype, accuracy. Later entries win.
        target_bits: Bits per weight that all weights together may take, scales, zero points and the padding of the
            target's layout included; 0 leaves the choice to the other options. Otherwise bits, blocks and, unless
            `symmetric`, zero points are shared out so that the expected KL divergence is least, and `bits`, `block`
            and the options by role do not count, except that 0 leaves alone. Scopes that name bits or a block hold.
            Where "auto" and "probed" find no statistics it does not count, and the other options do.
        target_ms: Milliseconds that all products and look-ups with these weights may take together for one token, on
            this machine, in the target's runtime and with the threads of the compile; 0 sets no limit. Everything is
            as for `target_bits`, and both limits hold where both are given. Every form that a weight may get is timed,
            which takes a minute or two; the times and their sum are in the manifest.
        times: A manifest.json with times that were measured before, perhaps elsewhere: the choice is made by these, and
            comes out the same again.
        widths: Bits that weights may get by `target_bits` and `target_ms`; default: all that the target can store, or
            with `target_bits` alone those that its runtime has fast kernels for, where these fit.
        scale_dtype: Type that scales are stored in: "activation" is that of the activations; "float16" saves
            16 / block bits a weight, and the runtime converts them when it loads the model. Weights whose scales
            float16 cannot hold get the other.
        accuracy: The least precision of products with the weights. "exact": activations stay float32; "bf16": they may
            be rounded to bfloat16; "int8": to int8 in short blocks, which is fastest, and loses more than codes of 8
            bits do; "auto" leaves it to the target's lowering, which measures what int8 loses. Where the runtime
            decides when it opens the model, as with `portable`, or has no such kernels, the manifest says so.
    """

    name: ClassVar[str] = "quantize_weights"
    group: ClassVar[str] = "quantize"
    lossless: ClassVar[bool] = False
    stage: ClassVar[Stage] = Stage.QUANTIZE

    bits: int = 4
    block: int = 32
    symmetric: bool = False
    method: MethodOption = "search"
    embedding_bits: int = 8
    lm_head_bits: int = 8
    sensitive_bits: int = 8
    sensitive: tuple[Sensitive, ...] = SENSITIVE
    min_elements: int = 1024
    exclude: tuple[str, ...] = ()
    scopes: tuple[dict[str, Any], ...] = ()
    scale_dtype: ScaleType = "float16"
    target_bits: float = 0.0
    target_ms: float = 0.0
    times: str = ""
    widths: tuple[int, ...] = ()
    accuracy: AccuracyOption = "auto"

    def __post_init__(self) -> None:
        where = self.name
        check_scheme(self.options(), where)
        for option in ("embedding_bits", "lm_head_bits", "sensitive_bits"):
            check_scheme({"bits": getattr(self, option)}, f"{where}.{option}", may_be_left=True)
        for width in self.widths:
            check_scheme({"bits": width}, f"{where}.widths")
        for option, todo in _LIMITS.items():
            value = getattr(self, option)
            if not 0 <= value < math.inf:  # NaN, too
                raise UsageError(f"{option} = {value!r} is not possible", where=where, todo=todo)
        if self.times and not self.target_ms:
            todo = f"set {where}.target_ms as well"
            raise UsageError("times are only of use with target_ms", where=f"{where}.times", todo=todo)
        compile_patterns(self.exclude, f"{where}.exclude")
        check_scopes(self.scopes, where)
        limit = next((option for option in _LIMITS if getattr(self, option)), "")
        if limit:
            self._check_nothing_else_is_asked_for(limit)

    def _check_nothing_else_is_asked_for(self, limit: str) -> None:
        """Refuse options that would not count, rather than ignore them."""
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name in _SHARED_OUT and value and value != option.default:
                shares = f"{limit} = {getattr(self, limit):g} shares bits and blocks out"
                what = f"{shares}: {option.name} would not count"
                todo = (
                    f"take recipe int4-fast, set {self.name}.{limit}=0 as well, or choose by name with "
                    f"{self.name}.scopes"
                )
                raise UsageError(what, where=f"{self.name}.{option.name}", todo=todo)

    def requires(self, model: Model, context: Context) -> None:
        """Check that the target can store what the options ask for.

        Raises:
            UsageError: It cannot.
        """
        if "calibrated" in self._methods:
            context.need_statistics("method 'calibrated' needs calibration data", self.name, "another method")
        if context.target is None:
            return
        roles = {self.embedding_bits, self.lm_head_bits, self.sensitive_bits}
        shares = self._shares_out(context)
        usual = set(self.widths) if shares else {self.bits, *roles}
        asked = usual | {scope.get("bits", 0) for scope in self.scopes}
        missing = sorted(bits for bits in asked - {0} if not _can_store(bits, context.target.weight_bits))
        if shares and 0 < self.target_bits < min(context.target.weight_bits, default=0):
            missing.append(int(self.target_bits))
        if missing:
            can = ", ".join(map(str, context.target.weight_bits))
            what = f"target '{context.target.name}' cannot store weights of {missing[0]} bits"
            raise UsageError(what, where=self.name, todo=f"choose one of {can}, or another target")

    @property
    def _methods(self) -> set[str]:
        return {self.method, *(scope["method"] for scope in self.scopes if "method" in scope)}

    @property
    def wants_statistics(self) -> bool:
        """Whether any weight may be quantized by calibration data."""
        return bool({"calibrated", *PROBING} & self._methods)

    @property
    def takes_own_text(self) -> bool:
        """Whether no method insists on calibration data."""
        return self.wants_statistics and "calibrated" not in self._methods

    @property
    def minds_cost(self) -> bool:
        """Whether statistics are only wanted where they take minutes at most."""
        return self.takes_own_text and "probed" not in self._methods

    @property
    def wants_gains(self) -> bool:
        """Whether bits are shared out by what errors do to the answer."""
        return self.wants_statistics and (self.target_bits > 0 or self.target_ms > 0)

    @property
    def wants_tied_gains(self) -> bool:
        """Whether a tied table's errors have to be weighed as those of a classifier and of an embedding."""
        return self.wants_statistics

    def apply(self, model: Model, context: Context) -> Change:
        """Replace the products and look-ups; the weight work itself is recorded and done at save.

        Raises:
            ModelError: The model cannot be converted to the opset that the codes need.
        """
        change = Change()
        if self.target_bits and not self._bits_count(context):
            what = f"{self.name}: target_bits = {self.target_bits:g} does not count without statistics"
            context.notes.append(f"{what}: bits go by role, up to {self.sensitive_bits}")
        infer_shapes(model)
        chosen = self._choose(model, change, context)
        if not chosen:
            return change
        opset, ir_version = (max(needs) for needs in zip(*(_NEEDS[s.bits] for _, s, _ in chosen), strict=True))
        if (model.opset() or 0) < opset:
            convert_opset(model, opset)
            follow_opset(model)
            change = Change(detail=change.detail | {"converted_to_opset": opset})
            known = {(group.name, group.k_axis): (scheme, account) for group, scheme, account in chosen}
            groups = [demand.group for demand in self._demands(model, change, context)]
            chosen = [(group, *known[group.name, group.k_axis]) for group in groups]
        model.graph.ir_version = max(model.graph.ir_version or 0, ir_version)
        Replacement(model, change, context.statistics).replace(chosen)
        return change

    def plan(self, model: Model, context: Context) -> dict[str, WeightScheme]:
        """Return how weights of the model as it is would be coded, by the initializers' names."""
        infer_shapes(model)
        return {group.name: scheme for group, scheme, _ in self._choose(model, Change(), context)}

    def _shares_out(self, context: Context) -> bool:
        return self._bits_count(context) or self.target_ms > 0

    def _bits_count(self, context: Context) -> bool:
        """Whether `target_bits` counts: guesses of what matters in other models are no reason to give up safe bits."""
        return self.target_bits > 0 and not (self.takes_own_text and context.statistics is None)

    def _demands(self, model: Model, change: Change, context: Context) -> list[Demand]:
        exclude = compile_patterns(self.exclude, self.name)
        shares = self._shares_out(context)
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
                free = (scoped.bits, scoped.block) == (settings.bits, settings.block) and shares
                demands.append(Demand(group, self._schemes(group, scoped, context, free=free)))
        return demands

    def _choose(self, model: Model, change: Change, context: Context) -> list[Chosen]:
        demands = self._demands(model, change, context)
        if not self._shares_out(context):
            return [(demand.group, demand.schemes[0], {}) for demand in demands]
        known = context.statistics if self.wants_statistics else None
        limits = Limits(self.target_bits if self._bits_count(context) else 0.0, self.target_ms)
        fast = context.target.fast_bits if context.target else ()
        if limits.bits and not self.target_ms and not self.widths:
            demands = fast_forms(demands, fast, limits, storage_of(context.target))
        times = None
        if self.target_ms and demands:
            times = times_of([(d.group, d.schemes) for d in demands], context, self.times, self.name)
            change.detail["product_times"] = times.to_json()
        schemes, accounts = share_out(demands, limits, storage_of(context.target), times, known, self.name)
        if times is not None:
            change.detail["expected_ms"] = round(sum(account["expected_ms"] for account in accounts), 6)
        return list(zip((d.group for d in demands), schemes, accounts, strict=True))

    def _schemes(
        self, group: WeightGroup, settings: Settings, context: Context, *, free: bool
    ) -> tuple[WeightScheme, ...]:
        stored = context.target.weight_bits if context.target else BITS
        allowed = self.widths or [bits for bits in BITS if _can_store(bits, stored)]
        forms = [form for form in FORMS if form[0] in allowed] if free else [(settings.bits, settings.block)]
        computes_in, data = group.sites[0].computes_in, context.statistics is not None
        if settings.scale_dtype == "float16" and not half_holds_scales(group.source, max(bits for bits, _ in forms)):
            settings = replace(settings, scale_dtype="activation")
        ways = (True, False) if free and not settings.symmetric else (settings.symmetric,)
        made = (
            replace(settings, bits=bits, block=block, symmetric=way).scheme(
                group.rows, group.columns, computes_in, data=data
            )
            for bits, block in forms
            for way in ways
        )
        return tuple(dict.fromkeys(made))

    def _settings(self, group: WeightGroup) -> Settings:
        linear = self.sensitive_bits if group.sensitive & set(self.sensitive) else self.bits
        by_role = {"embedding": self.embedding_bits, "lm_head": self.lm_head_bits, "linear": linear}
        widths = [by_role[role] for role in group.roles]
        bits = max(widths) if all(widths) else 0
        block = self.block if bits <= self.bits else max(self.block, LONG_BLOCK)
        block = block if self.block else 0
        return Settings(bits, block, self.symmetric, self.method, self.scale_dtype, self.accuracy)


def _can_store(bits: int, widths: Collection[int]) -> bool:
    return all(width in widths for width in PLANES.get(bits, (bits,)))
