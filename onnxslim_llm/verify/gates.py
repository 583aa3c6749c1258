"""What an artifact must reach to be published.

Where the numbers come from:

- lossless, float32: rounding in another order moves logits of magnitude 10-30 by 1e-5 (measured on trained decoders of
  5 layers); 1e-3 leaves room for deep models and is far below what any wrong rewrite does.
- lossless, half precision: an operation rounds by u = 2^-11 (bfloat16 2^-8) of its result. All roundings of a decoder
  together (float16 against float32 with the same weights, 2, 6 and 24 layers) move logits by up to 2.5 u of the largest
  logit; 8 u leaves a factor of 3 for models with outliers. The mean KL that goes with it was 4e-6.
- int8: mean KL 0.0014 is published for 8-bit blocks on an 8 B model; small models measured here stay below 0.0021.
- int4: plain round-to-nearest in blocks of 32 has a mean KL of 0.07 on an 8 B model, 0.02-0.13 on trained models of
  0.3-5 M parameters and 0.12-0.28 on random ones, where no weight is redundant. One layer with its sign, its nibbles or
  its zero points wrong gives 2.2-4.6 on the trained 5 M model, where 3 bits give 0.08-0.16 and 2 bits 0.7-1.1. The
  limits lie between: they tell an artifact that works from a broken one. Whether it is good enough for a use, `eval` on
  text tells; a recipe may set tighter gates.
- w8a8: 8-bit activations with one scale per tensor have a mean KL of 0.002 (products only) to 0.014 (all operators) on
  the trained 5 M model, with the most sensitive ones in 16 bits, and 0.09 where ranges are chosen badly; a range that
  is wrong altogether gives 1. 17 dB for other models is a cosine of 0.99.
- int3, int2: the power of the error grows fourfold with every bit that is dropped; beyond 2 nats nothing is left.
- Other models than decoders have no distribution to compare: the signal-to-noise ratio of all outputs together, 6 dB
  a bit as quantization theory has it, from 30 dB at 8 bits on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from onnxslim_llm.errors import UsageError, did_you_mean

__all__ = ["KINDS", "Gate", "GateResult", "Precision", "default_gates", "evaluate", "lossless_limit", "parse_gate"]

Kind = Literal["lossless", "int8", "w8a8", "int4", "int3", "int2", "none"]
Precision = Literal["float32", "float16", "bfloat16"]

KINDS: tuple[Kind, ...] = ("lossless", "int8", "w8a8", "int4", "int3", "int2", "none")

FIGURES = (
    *("max_abs", "max_rel", "sqnr_db", "cosine", "kl_mean", "top1_agreement", "greedy_prefix_match", "nonfinite"),
    *("ppl_ratio", "kld_mean", "kld_p99"),
)

_LOSSLESS_FLOAT32 = 1e-3
_HALF_ROUNDINGS = 8
_KL_HALF = 1e-3
_UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}

_KL_8_BITS = {"int8": 3e-3, "w8a8": 5e-2}
_KL_INT4 = ((3e9, 0.10), (1e8, 0.20), (0, 0.35))  # (parameters from, limit): large models have more to spare
_KL_FACTOR = {"int3": 4.0, "int2": 16.0}
_KL_MOST = 2.0

_SQNR = {"int8": 30.0, "w8a8": 17.0, "int4": 10.0, "int3": 4.0, "int2": 0.0}


@dataclass(frozen=True)
class Gate:
    """One limit: `figure` must be at most ("max") or at least ("min") `limit`."""

    figure: str
    limit: float
    direction: Literal["max", "min"] = "max"

    def __str__(self) -> str:
        return f"{self.figure} {'<=' if self.direction == 'max' else '>='} {self.limit:.4g}"


@dataclass(frozen=True)
class GateResult:
    """A gate, the value that was measured (None if it could not be) and whether it passes."""

    gate: str
    limit: float
    direction: Literal["max", "min"]
    value: float | None
    ok: bool

    def __str__(self) -> str:
        value = "not measured" if self.value is None else f"{self.value:.4g}"
        sign = "<=" if self.direction == "max" else ">="
        return f"{self.gate} {value}, must be {sign} {self.limit:.4g}"


def lossless_limit(precision: Precision, absmax: float) -> float:
    """Largest difference that rounding alone explains, for outputs of magnitude up to `absmax`."""
    if precision == "float32":
        return _LOSSLESS_FLOAT32
    return max(_LOSSLESS_FLOAT32, _HALF_ROUNDINGS * _UNIT[precision] * absmax)


def default_gates(
    kind: str, *, decoder: bool, precision: Precision = "float32", absmax: float = 1.0, parameters: int = 0
) -> tuple[Gate, ...]:
    """The gates of a recipe kind.

    Args:
        kind: one of `KINDS`: how strongly the recipe changes numbers; "none" only forbids non-finite values.
        decoder: whether logits are compared (KL divergence) or other outputs.
        precision: of the source's activations.
        absmax: largest magnitude of the source's compared outputs.
        parameters: number of weight elements of the source.

    Raises:
        UsageError: unknown kind.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown gate kind '{kind}'", todo=did_you_mean(kind, KINDS))
    gates = [Gate("nonfinite", 0.0)]
    if kind == "lossless":
        # Outputs that are no logits have any unit; their float32 limit is taken relative to their size too.
        scale = 1.0 if decoder else max(1.0, absmax)
        gates.append(Gate("max_abs", max(lossless_limit(precision, absmax), _LOSSLESS_FLOAT32 * scale)))
        if decoder:
            gates.append(Gate("greedy_prefix_match", 1.0, "min"))
        if decoder and precision != "float32":
            gates.append(Gate("kl_mean", _KL_HALF))
    elif kind != "none" and decoder:
        int4 = next(limit for start, limit in _KL_INT4 if parameters >= start)
        gates.append(Gate("kl_mean", _KL_8_BITS.get(kind, min(_KL_MOST, int4 * _KL_FACTOR.get(kind, 1.0)))))
    elif kind != "none":
        gates.append(Gate("sqnr_db", _SQNR[kind], "min"))
    return tuple(gates)


def parse_gate(text: str) -> Gate:
    """Read "kl_mean <= 0.05" or "cosine >= 0.99".

    Raises:
        UsageError: the text is no gate, or the figure is unknown.
    """
    found = re.fullmatch(r"\s*(\w+)\s*(<=|>=)\s*(\S+)\s*", text)
    try:
        limit = float(found.group(3)) if found else 0.0
    except ValueError:
        found = None
    if found is None:
        raise UsageError(f"not a gate: '{text}'", todo="write it like 'kl_mean <= 0.05' or 'cosine >= 0.99'")
    figure = found.group(1)
    if figure not in FIGURES:
        raise UsageError(f"unknown figure '{figure}' in the gate '{text}'", todo=did_you_mean(figure, FIGURES))
    return Gate(figure, limit, "max" if found.group(2) == "<=" else "min")


def evaluate(gates: Iterable[Gate], figures: Mapping[str, float | None]) -> tuple[GateResult, ...]:
    """Check every gate; a figure that is missing or NaN does not pass."""
    results = []
    for gate in gates:
        value = figures.get(gate.figure)
        ok = value is not None and (value <= gate.limit if gate.direction == "max" else value >= gate.limit)
        results.append(GateResult(gate.figure, gate.limit, gate.direction, value, ok))
    return tuple(results)
