"""Attention as one node: scores, mask, softmax, weighted values, and the KV cache.

The meaning is that of ai.onnx Attention (opset 24), of which this is the part that models use:

    K' = past_key ++ K, V' = past_value ++ V                  (along the sequence; without a past, K and V themselves)
    scores = scale * Q K'^T                                   [B, H, S, T], T = P + S
    scores = softcap * tanh(scores / softcap)                 if softcap > 0
    scores = scores + bias                                    if there is one
    scores[..., i, j] = -inf unless j <= P + i                if causal
    scores[..., i, j] = -inf unless j > P + i - window        if window > 0
    weights = softmax(scores)                                 in float32 if float_softmax
    weights[..., i, :] = 0 where all of scores[..., i, :] are -inf, if zero_rows; NaN otherwise
    Y = weights V'

Query head h reads key and value head h // (q_num_heads / kv_num_heads).

Inputs (token-major): Q[B, S, Hq * D], K[B, S, Hkv * D], V[B, S, Hkv * Dv]; head-major forms have Q[B, Hq, S, D] etc.
past_key[B, Hkv, P, D] and past_value are head-major always, and so are the outputs present_key and present_value. The
bias is a float that broadcasts to [B, Hq, S, T]. Y is laid out like Q.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxslim_llm.concepts.concept import DOMAIN, Concept
from onnxslim_llm.ir.model import Model

__all__ = ["AttentionForm", "attention_form", "call_attention", "is_attention"]

_NAME = "Attention"


@dataclass(frozen=True)
class AttentionForm:
    """Which of the steps and operands an attention has; each form is a concept of its own.

    Attributes:
        heads_major: Q, K, V and Y are [B, H, S, D] rather than [B, S, H * D].
        past: There is a KV cache to append to.
        present: The outputs present_key and present_value exist.
        bias: There is an additive mask.
        causal, window, softcap: See the module.
        grouped: Hkv < Hq.
        zero_rows: A query that sees no key gives zeros rather than NaN.
        float_softmax: The softmax of a 16-bit model is computed in float32.
    """

    heads_major: bool = False
    past: bool = False
    present: bool = False
    bias: bool = False
    causal: bool = False
    window: bool = False
    softcap: bool = False
    grouped: bool = False
    zero_rows: bool = False
    float_softmax: bool = False

    @property
    def name(self) -> str:
        """Operator name of the form."""
        flags = {
            "HeadMajor": self.heads_major,
            "Past": self.past,
            "Present": self.present,
            "Bias": self.bias,
            "Causal": self.causal,
            "Window": self.window,
            "Softcap": self.softcap,
            "Grouped": self.grouped,
            "ZeroRows": self.zero_rows,
            "FloatSoftmax": self.float_softmax,
        }
        return "_".join([_NAME, *(flag for flag, on in flags.items() if on)])

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the formal inputs, in order."""
        return ("Q", "K", "V", *(("past_key", "past_value") if self.past else ()), *(("bias",) if self.bias else ()))

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the formal outputs, in order."""
        return ("Y", *(("present_key", "present_value") if self.present else ()))

    def concept(self) -> Concept:
        """Return the operator with its meaning in plain ai.onnx."""
        body = "\n        ".join(self._body())
        attributes = "<q_num_heads, kv_num_heads, scale, softcap, window>"
        head = f"{attributes} ({', '.join(self.inputs)}) => ({', '.join(self.outputs)})"
        return Concept(self.name, f"{head} {{\n        {body}\n    }}", min_opset=18)

    def _body(self) -> list[str]:
        lines = [
            "zero = Constant <value_ints = [0]> ()",
            "two = Constant <value_ints = [2]> ()",
            "rest = Constant <value_ints = [-1]> ()",
            "hq0 = Constant <value_int: int = @q_num_heads> ()",
            "hk0 = Constant <value_int: int = @kv_num_heads> ()",
            "hq = Unsqueeze (hq0, zero)",
            "hk = Unsqueeze (hk0, zero)",
        ]
        if self.heads_major:
            lines += ["q = Identity (Q)", "k_new = Identity (K)", "v_new = Identity (V)"]
        else:
            lines += [
                "keep = Constant <value_ints = [0, 0]> ()",
                "q_shape = Concat <axis = 0> (keep, hq, rest)",
                "k_shape = Concat <axis = 0> (keep, hk, rest)",
            ]
            for name, operand, shape in (("q", "Q", "q_shape"), ("k_new", "K", "k_shape"), ("v_new", "V", "k_shape")):
                lines.append(f"{name}_tokens = Reshape ({operand}, {shape})")
                lines.append(f"{name} = Transpose <perm = [0, 2, 1, 3]> ({name}_tokens)")
        for name in ("k", "v"):
            if self.past:
                past = "past_key" if name == "k" else "past_value"
                lines.append(f"{name} = Concat <axis = 2> ({past}, {name}_new)")
            else:
                lines.append(f"{name} = Identity ({name}_new)")
        # Query heads of a group become rows of one product with their key head: the cache is read once a group.
        group = "Reshape ({}, group_shape)" if self.grouped else "Identity ({})"
        apart = "Reshape ({}, head_shape)" if self.grouped else "Identity ({})"
        if self.grouped:
            lines += [
                "group_shape = Concat <axis = 0> (zero, hk, rest, zero)",
                "head_shape = Concat <axis = 0> (zero, hq, rest, zero)",
            ]
        lines += [
            "scale0 = Constant <value_float: float = @scale> ()",
            "scale_like = CastLike (scale0, Q)",
            "q_scaled = Mul (q, scale_like)",
            f"q_grouped = {group.format('q_scaled')}",
            "k_t = Transpose <perm = [0, 1, 3, 2]> (k)",
            "product = MatMul (q_grouped, k_t)",
            f"scores_0 = {apart.format('product')}",
        ]
        current = "scores_0"
        if self.softcap:
            lines += [
                "cap0 = Constant <value_float: float = @softcap> ()",
                "cap = CastLike (cap0, Q)",
                f"uncapped = Div ({current}, cap)",
                "bent = Tanh (uncapped)",
                "scores_1 = Mul (bent, cap)",
            ]
            current = "scores_1"
        if self.bias:
            lines.append(f"scores_2 = Add ({current}, bias)")
            current = "scores_2"
        if self.causal or self.window:
            lines += self._positions(current)
            current = "scores_3"
        lines += self._softmax(current)
        lines += [
            f"weights_grouped = {group.format('weights')}",
            "mixed = MatMul (weights_grouped, v)",
            f"y = {apart.format('mixed')}",
        ]
        if self.heads_major:
            lines.append("Y = Identity (y)")
        else:
            lines += [
                "y_tokens = Transpose <perm = [0, 2, 1, 3]> (y)",
                "flat = Constant <value_ints = [0, 0, -1]> ()",
                "Y = Reshape (y_tokens, flat)",
            ]
        if self.present:
            lines += ["present_key = Identity (k)", "present_value = Identity (v)"]
        return lines

    def _softmax(self, scores: str) -> list[str]:
        lines = [f"softmax_0 = Softmax <axis = -1> ({scores})"]
        if self.float_softmax:
            lines = [
                f"wide = Cast <to = 1> ({scores})",
                "wide_softmax = Softmax <axis = -1> (wide)",
                "softmax_0 = CastLike (wide_softmax, Q)",
            ]
        if not self.zero_rows:
            return [*lines, "weights = Identity (softmax_0)"]
        return [
            *lines,
            "empty_rows = IsNaN (softmax_0)",
            "nothing = Constant <value_float = 0.0> ()",
            "nothing_like = CastLike (nothing, Q)",
            "weights = Where (empty_rows, nothing_like, softmax_0)",
        ]

    def _positions(self, scores: str) -> list[str]:
        lines = [
            "q_dims = Shape (q)",
            "k_dims = Shape (k)",
            "rows_n = Gather (q_dims, two)",
            "total_n = Gather (k_dims, two)",
            "rows_0d = Squeeze (rows_n, zero)",
            "total_0d = Squeeze (total_n, zero)",
            "none = Constant <value_int = 0> ()",
            "one = Constant <value_int = 1> ()",
            "first = Sub (total_0d, rows_0d)",
            "row = Range (first, total_0d, one)",
            "row_column = Unsqueeze (row, rest)",
            "column = Range (none, total_0d, one)",
        ]
        if self.causal:
            lines.append("seen = LessOrEqual (column, row_column)")
        if self.window:
            lines += [
                "width = Constant <value_int: int = @window> ()",
                "oldest = Sub (row_column, width)",
                "near = Greater (column, oldest)",
            ]
        both = {(True, True): "And (seen, near)", (True, False): "Identity (seen)", (False, True): "Identity (near)"}
        return [
            *lines,
            f"allowed = {both[self.causal, self.window]}",
            # Only -inf makes a row of zeros; a finite number leaves it what masks of finite numbers make of it.
            f"lowest = Constant <value_float = {'-inf' if self.zero_rows else '-3.4028234663852886e+38'}> ()",
            "lowest_like = CastLike (lowest, Q)",
            f"scores_3 = Where (allowed, {scores}, lowest_like)",
        ]


def call_attention(
    model: Model,
    name: str,
    form: AttentionForm,
    inputs: Sequence[gs.Tensor],
    outputs: Sequence[gs.Variable],
    *,
    q_num_heads: int,
    kv_num_heads: int,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> gs.Node:
    """Return an attention node; the caller puts it into a graph.

    Args:
        model: The model whose graph the node is for.
        name: Name of the node.
        form: Which steps and operands it has.
        inputs: As `form.inputs` says.
        outputs: As `form.outputs` says.
        q_num_heads: Hq.
        kv_num_heads: Hkv.
        scale: Factor of the products.
        softcap: Bound of the scores; 0 if the form has none.
        window: Keys that a query sees, itself included; 0 if the form has none.
    """
    attributes = {
        "q_num_heads": q_num_heads,
        "kv_num_heads": kv_num_heads,
        "scale": float(scale),
        "softcap": float(softcap),
        "window": window,
    }
    return form.concept().call(model, name, inputs, outputs, attributes)


def is_attention(node: gs.Node) -> bool:
    """Return whether `node` is an attention of any form."""
    return bool(node.domain == DOMAIN and node.op.split("_")[0] == _NAME)


def attention_form(node: gs.Node) -> AttentionForm:
    """Return the form of an attention node."""
    flags = set(node.op.split("_")[1:])
    return AttentionForm(
        heads_major="HeadMajor" in flags,
        past="Past" in flags,
        present="Present" in flags,
        bias="Bias" in flags,
        causal="Causal" in flags,
        window="Window" in flags,
        softcap="Softcap" in flags,
        grouped="Grouped" in flags,
        zero_rows="ZeroRows" in flags,
        float_softmax="FloatSoftmax" in flags,
    )
