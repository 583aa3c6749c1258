"""Sums over tokens of what single tokens contribute to the gradient of a weight, in one matrix product.

A product Y = X W has dW = sum_t x_t^T d_t, with d the gradient of Y. The sum of the squares of the terms is
(X o X)^T (D o D), that of their magnitudes |X|^T |D|: both as cheap as dW itself, where the gradients of single tokens
would take a backward pass each. (What two positions of one text contribute together is left out, as in K-FAC; Martens &
Grosse 2015, arXiv 1503.05671.)
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from onnxslim_llm.gradients.backend import torch
from onnxslim_llm.gradients.rule import Call, Rule
from onnxslim_llm.gradients.source import Figure
from onnxslim_llm.products.reads import read_weight
from onnxslim_llm.rewrite.schema import normal_domain

if TYPE_CHECKING:
    from torch import Tensor

    from onnxslim_llm.ir.model import Model

__all__ = ["product_rules"]


class _Product(torch.autograd.Function):  # type: ignore[misc]  # torch is not looked at
    """X W whose "gradient" of W is the sum of magnitudes or squares."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, figure: Figure) -> Tensor:
        context.save_for_backward(x, weight)
        context.figure = figure
        return x @ weight

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = context.saved_tensors
        wants_x, wants_weight, _ = context.needs_input_grad
        back = gradient @ weight.T if wants_x else None
        if not wants_weight:
            return back, None, None
        rows, slopes = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        change = torch.abs if context.figure == "absolute" else torch.square
        return back, change(rows).T @ change(slopes), None


def product_rules(model: Model, weights: Collection[str], figure: Figure) -> dict[int, Rule]:
    """Return rules, by the identity of the node, for all products with the named weights.

    Between a weight and its product there are only casts and transpositions, which the sums pass like gradients do.
    """

    def rule(call: Call) -> Tensor:
        x, weight, bias = call.input(0), call.input(1), call.optional(2)
        if call.op == "MatMul":
            return _Product.apply(x, weight, figure)
        scaled = x if call.attributes["alpha"] == 1 else x * call.attributes["alpha"]
        y = _Product.apply(scaled, weight.T if call.attributes["transB"] else weight, figure)
        return y if bias is None else y + bias * call.attributes["beta"]

    found: dict[int, Rule] = {}
    for graph in model.graphs():
        for node in graph.nodes:
            if normal_domain(node.domain) == "" and node.op in ("MatMul", "Gemm"):
                read = read_weight(node.inputs[1])
                turned = node.op == "Gemm" and node.attrs.get("transA", 0)
                if read is not None and read.constant.name in weights and not turned:
                    found[id(node)] = rule
    return found
