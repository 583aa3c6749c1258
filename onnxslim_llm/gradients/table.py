"""Which rule computes a node."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.attention import attention_form, is_attention
from onnxslim_llm.concepts.concept import DOMAIN
from onnxslim_llm.gradients.operators import elementwise, fused, making, products, quantizing, reducing, shaping
from onnxslim_llm.gradients.rule import Rule
from onnxslim_llm.rewrite.schema import normal_domain

__all__ = ["rule_of"]

_STANDARD: dict[str, Rule] = {
    **elementwise.RULES,
    **shaping.RULES,
    **making.RULES,
    **reducing.RULES,
    **products.RULES,
    **quantizing.RULES,
}


def rule_of(node: gs.Node) -> Rule | None:
    """Return the rule for an operator; None if there is none (a function may have a body all the same)."""
    domain = normal_domain(node.domain)
    if not domain:
        return _STANDARD.get(node.op)
    if domain != DOMAIN:
        return None
    return fused.attention_rule(attention_form(node)) if is_attention(node) else fused.RULES.get(node.op)
