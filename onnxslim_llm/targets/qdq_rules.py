"""What a target computes on integers: which operators, in which types, between which pairs of Q and DQ nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from onnxslim_llm.ir.model import Model

__all__ = ["ActivationType", "Granularity", "QdqRules", "QuantizedOp", "Restriction", "WeightType"]

ActivationType = Literal["uint8", "int8", "uint16", "int16"]
WeightType = Literal["int8", "uint8", "int4", "uint4"]
Granularity = Literal["channel", "tensor"]
#: Returns why the target would compute a node in float although its operator has a rule, or nothing. The node is part
#: of the lowered graph, shapes inferred where they are known.
Restriction = Callable[["gs.Node", "Model"], str]


@dataclass(frozen=True)
class QuantizedOp:
    """How the nodes of one operator are quantized.

    Attributes:
        inputs: Positions of the inputs that come quantized; None for all float inputs but weight and bias. A constant
            there is stored in the activations' type, with one scale.
        weight: Position of the input that is stored in the weights' type where it is constant; where it is computed
            it counts as an input.
        per_channel: Whether that weight may have a scale for each of its output channels.
        needs_weight: Nodes whose weight is no constant stay float.
        bias: Position of the constant that is stored as int32, in units of input scale * weight scale.
        quantized_result: Whether results are rounded, too. False: the kernel hands on floats, and readers that stay
            float see them unrounded.
        same_scale: The operator moves data without computing: inputs and results share scale and zero point.
        result_range: Where results lie whatever the data, such as (0, 1) for Softmax; None if the data say it.
    """

    inputs: tuple[int, ...] | None = None
    weight: int | None = None
    per_channel: bool = True
    needs_weight: bool = False
    bias: int | None = None
    quantized_result: bool = True
    same_scale: bool = False
    result_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class QdqRules:
    """What a target executes on integers.

    Attributes:
        ops: Rules by operator of ai.onnx, or "domain::Op". Operators that are not there stay float.
        activations: Types of activations that the target has kernels for, the preferred one first. Wider ones are
            what sensitive nodes get; where there are none, sensitive nodes stay float.
        weights: Types of weights, the preferred one first.
        granularity: Whether weights have a scale per output channel or one per tensor.
        blocked_weights: Types of weights that are dequantized in blocks and may stand beside quantized activations.
        blocked_activation_bits: Width of the activations that these are multiplied with; 0 for any.
        weight_symmetric: Zero points of weights are zero (of unsigned ones: the middle).
        activation_symmetric: Likewise of activations.
        allowed_pairs: (activation, weight) types that one product may have; None for all.
        bias_integer: Whether a bias is stored as int32; False leaves it float.
        restrictions: Called with every node that has a rule.
        min_opset: The least version of ai.onnx that artifacts with Q and DQ nodes must have here.
    """

    ops: Mapping[str, QuantizedOp]
    activations: tuple[ActivationType, ...] = ("uint8",)
    weights: tuple[WeightType, ...] = ("int8",)
    granularity: Granularity = "channel"
    blocked_weights: tuple[WeightType, ...] = ()
    blocked_activation_bits: int = 0
    weight_symmetric: bool = True
    activation_symmetric: bool = False
    allowed_pairs: frozenset[tuple[ActivationType, WeightType]] | None = None
    bias_integer: bool = True
    restrictions: tuple[Restriction, ...] = field(default=())
    min_opset: int = 13

    def rule_of(self, domain: str, op: str) -> QuantizedOp | None:
        """Return the rule of an operator; `domain` is "" for ai.onnx."""
        return self.ops.get(f"{domain}::{op}" if domain else op)
