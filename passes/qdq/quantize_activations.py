"""Let a target compute on integers, with ranges from data."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.opset import convert_opset
from onnxslim_llm.ir.shapes import infer_shapes
from onnxslim_llm.passes.qdq.codings import Codings, Width, width_of
from onnxslim_llm.passes.qdq.insertion import Insertion
from onnxslim_llm.passes.qdq.nodes import QdqNode, attached, find_nodes, has_blocked_weight
from onnxslim_llm.passes.qdq.scale_groups import Groups
from onnxslim_llm.passes.qdq.sensitivity import Power, Together, powers_of_results, result_quality, with_makers
from onnxslim_llm.rewrite.passes import Change, Pass
from onnxslim_llm.stats.ranges import CALIBRATORS, CalibratorName
from onnxslim_llm.targets.qdq_rules import ActivationType, QdqRules, WeightType
from onnxslim_llm.targets.qdq_tables import PRODUCT_RULES

if TYPE_CHECKING:
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.rewrite.context import Context
    from onnxslim_llm.stats.observe import Collector

__all__ = ["QuantizeActivations"]

_ACTIVATIONS: tuple[ActivationType, ...] = get_args(ActivationType)
_WIDE = 16
#: ai.onnx that brought codes of 16 and of 4 bits.
_OPSET_OTHER_WIDTHS = 21
#: ai.onnx that brought scales in float16.
_OPSET_HALF = 19


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Round activations and weights to integers around the operators that the target computes on integers.

    Which operators these are, between which types, and what shares a scale is what the target says; a target without
    integer kernels is left alone. Ranges come from calibration data, which run through the graph as it is here; weights
    that are float get a scale per output channel, a bias becomes int32. The pass works on the target's operators:
    compiles run it after the lowering, wherever a recipe names it.

    Before:
        Y = MatMul (X, W)
    After:
        x = QuantizeLinear (X, x_scale, x_zero_point)
        X_1 = DequantizeLinear (x, x_scale, x_zero_point)
        W_1 = DequantizeLinear <axis = 1> (W_q8, W_scale)
        Y = MatMul (X_1, W_1)

    Skips when:
        - the target has no rule for the operator, or a restriction of its own;
        - the node's name matches `exclude`;
        - it is more sensitive than `float_below_db` and the target has no wider codes;
        - its weight is computed and the target multiplies with stored weights only; or it is stored in a type or in
          blocks that the target multiplies with float activations;
        - Gemm transposes its input or scales its product, or its bias is computed;
        - sums of its products may leave int32;
        - it moves data between nodes that stay float;
        - it lies in a subgraph;
        - inputs or results have Q and DQ nodes already: those stay as they are.

    Attributes:
        activations: Type of activations: uint8, int8, uint16 or int16. A target that has another type of as many bits
            gets that; one without codes so wide leaves activations float.
        weight_bits: Width of weights that are float here: 8 or 4; 0 leaves products with them float.
        calibrator: How ranges are chosen: "minmax"; "percentile"; "entropy" for the least KL divergence; "mse" for the
            least squared error; "moving_average" of the extremes of samples.
        percentile: For that calibrator: percentage of values that are not clipped.
        symmetric: Zero points in the middle of the codes.
        sensitive_below_db: Nodes whose result would have a lower signal-to-noise ratio, in dB, get 16-bit codes. 0 asks
            for nothing.
        float_below_db: Where the target has no 16-bit codes, nodes with a lower ratio stay float; -1: the same limit;
            0: none.
        exclude: Regular expressions; nodes whose name has a match stay float.
    """

    name: ClassVar[str] = "quantize_activations"
    group: ClassVar[str] = "qdq"
    lossless: ClassVar[bool] = False
    after_lowering: ClassVar[bool] = True

    activations: ActivationType = "uint8"
    weight_bits: Literal[0, 4, 8] = 8
    calibrator: CalibratorName = "mse"
    percentile: float = 99.99
    symmetric: bool = False
    sensitive_below_db: float = 0.0
    float_below_db: float = -1.0
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[Any, ...]] = {
            "activations": _ACTIVATIONS,
            "weight_bits": (0, 4, 8),
            "calibrator": CALIBRATORS,
        }
        for option, choices in allowed.items():
            value = getattr(self, option)
            if value not in choices:
                todo = f"choose one of {', '.join(map(str, choices))}"
                raise UsageError(f"{option} = {value!r} is not possible", where=self.name, todo=todo)
        if not 50 < self.percentile <= 100:
            what = f"percentile = {self.percentile:g} is not possible"
            raise UsageError(what, where=self.name, todo="choose one above 50, up to 100")
        self._patterns()

    def requires(self, model: Model, context: Context) -> None:
        """Check that the graph can be run.

        Raises:
            UsageError: Nothing runs it, so that ranges are not known.
        """
        if context.observer is None:
            todo = "run it as part of a compile, or give the context an observer"
            raise UsageError("ranges of activations need calibration data", where=self.name, todo=todo)

    def apply(self, model: Model, context: Context) -> Change:
        """Observe the graph, then put Q and DQ nodes in.

        Raises:
            ModelError: A range is zero or not finite, or the model does not run; tensor or node are named.
        """
        change = Change()
        rules = PRODUCT_RULES if context.target is None else context.target.qdq
        width, why = self._width(rules, context)
        if rules is None or width is None:
            change.skip("the model", why)
            context.notes.append(f"{self.name}: {why}: they stay float")
            return change
        infer_shapes(model)
        nodes = find_nodes(model, rules, weights=self.weight_bits > 0, exclude=self._patterns(), change=change)
        if not nodes:
            return change
        groups, powers = self._observe(model, nodes, context)
        nodes, groups, wide, sensitive = self._sensitive(nodes, groups, rules, width, powers, change)
        kind = self._weight_type(rules, width)
        self._raise_opset(model, rules, nodes, {width.bits, wide.bits} if sensitive else {width.bits}, kind, change)
        codings = Codings(nodes, groups, width, wide, sensitive)
        insertion = Insertion(model, rules, codings, kind)
        insertion.run(nodes)
        change.sites += [item.label for item in nodes]
        change.detail.update(
            operators=dict(sorted(Counter(item.node.op for item in nodes).items())),
            pairs=insertion.pairs,
            weights=len(insertion.weights),
            activations=width.kind,
            sensitive=[item.label for item in nodes if id(item.node) in sensitive],
        )
        return change

    def _patterns(self) -> list[re.Pattern[str]]:
        found = []
        for pattern in self.exclude:
            try:
                found.append(re.compile(pattern))
            except (re.error, TypeError) as error:
                what = f"{pattern!r} is no regular expression: {error}"
                raise UsageError(what, where=f"{self.name}.exclude") from error
        return found

    def _width(self, rules: QdqRules | None, context: Context) -> tuple[Width | None, str]:
        target = "the target" if context.target is None else f"target '{context.target.name}'"
        if rules is None:
            return None, f"{target} computes nothing on integers"
        bits = int(self.activations.lstrip("uint"))
        width = width_of(rules, bits, self.activations, self.symmetric)
        if width is None:
            return None, f"{target} has no kernels for {bits}-bit activations"
        if width.kind != self.activations:
            context.notes.append(f"{self.name}: {target} takes {width.kind} instead of {self.activations}")
        return width, ""

    def _weight_type(self, rules: QdqRules, width: Width) -> WeightType:
        fitting = [
            kind
            for kind in rules.weights
            if int(kind.lstrip("uint")) == self.weight_bits
            and (rules.allowed_pairs is None or (width.kind, kind) in rules.allowed_pairs)
        ]
        if not fitting and self.weight_bits:
            have = ", ".join(rules.weights)
            what = f"{self.weight_bits}-bit weights do not go with {width.kind} activations here"
            raise UsageError(what, where=f"{self.name}.weight_bits", todo=f"the target has weights of {have}")
        return fitting[0] if fitting else rules.weights[0]

    def _observe(self, model: Model, nodes: Sequence[QdqNode], context: Context) -> tuple[Groups, dict[str, Power]]:
        groups = Groups(nodes)
        shared = context.shared_ranges
        powers: dict[str, Power] = {}
        unknown: dict[str, Power] = {}
        if self.sensitive_below_db > 0:
            powers, unknown = powers_of_results(nodes, shared)
        collectors: dict[str, Collector] = {**groups.collectors(self.calibrator, self.percentile, shared)}
        for name, power in unknown.items():
            collectors[name] = Together((collectors[name], power)) if name in collectors else power
        assert context.observer is not None
        context.observer.observe(model, collectors)
        return groups, powers

    def _sensitive(
        self,
        nodes: list[QdqNode],
        groups: Groups,
        rules: QdqRules,
        width: Width,
        powers: dict[str, Power],
        change: Change,
    ) -> tuple[list[QdqNode], Groups, Width, set[int]]:
        """Return the nodes to quantize, their groups, the type of sensitive ones, and which these are."""
        if width.bits >= _WIDE:
            return nodes, groups, width, set()
        wide = width_of(rules, _WIDE, None, self.symmetric)
        blocked: set[int] = set()
        if wide is not None and rules.blocked_activation_bits > width.bits:
            blocked = {id(item.node) for item in nodes if has_blocked_weight(item)}
        if self.sensitive_below_db <= 0:
            return nodes, groups, wide or width, blocked
        quality = {
            id(item.node): result_quality(item, groups, width, powers) for item in nodes if not item.rule.same_scale
        }
        found = [
            item for item in nodes if quality.get(id(item.node), self.sensitive_below_db) < self.sensitive_below_db
        ]
        if wide is not None:
            return nodes, groups, wide, with_makers(found, nodes) | blocked
        if self.float_below_db >= 0:
            limit = self.float_below_db or -math.inf
            found = [item for item in found if quality[id(item.node)] < limit]
        for item in found:
            change.skip(item.label, f"rounded inputs would leave it {quality[id(item.node)]:.0f} dB: it stays float")
        gone = {id(item.node) for item in found}
        kept = attached([item for item in nodes if id(item.node) not in gone], change)
        smaller = Groups(kept)
        smaller.adopt(groups)
        return kept, smaller, width, set()

    def _raise_opset(
        self,
        model: Model,
        rules: QdqRules,
        nodes: Sequence[QdqNode],
        bits: set[int],
        kind: WeightType,
        change: Change,
    ) -> None:
        half = any(tensor.dtype == "float16" for item in nodes for tensor in item.node.inputs)
        stores = any(item.weight is not None for item in nodes)
        others = _WIDE in bits or (stores and kind in ("int4", "uint4"))
        needed = max(rules.min_opset, _OPSET_HALF if half else 0, _OPSET_OTHER_WIDTHS if others else 0)
        if (model.opset() or 0) < needed:
            convert_opset(model, needed)
            change.detail["converted_to_opset"] = needed
