"""Whether a model is small enough that a compile may run it unasked, to learn what its weights are multiplied with."""

from __future__ import annotations

import onnx

from onnxslim_llm.stats.gains import GAIN_TOKENS
from onnxslim_llm.stats.taps import find_taps

__all__ = ["MOST_WORK", "probing_work", "too_much_work"]

#: Multiplications. Two cores (AVX-512) do some 2.5e10 of them a second, all that goes with them included: the sample
#: model takes 4e11, and a quarter of a minute. So this is about four minutes, and a Llama of some 60 M parameters. What
#: is counted depends on nothing but shapes: the same model is treated alike on every machine.
MOST_WORK = 6e12


def probing_work(model: onnx.ModelProto, tokens: int) -> float:
    """Return how many multiplications writing a text, its statistics and the gains of all weights take.

    The codes are not counted: GPTQ takes K^2 N multiplications a weight, a few per cent of that.

    Args:
        model: The source; its weights may be left out.
        tokens: Of the text.
    """
    sizes = {tensor.name: float(tensor.dims[0] * tensor.dims[1]) for tensor in model.graph.initializer
             if len(tensor.dims) == 2}  # fmt: skip
    taps = find_taps(model.graph)
    read = [name for tap in taps for name in tap.weights if name in sizes]
    forward = sum(sizes[name] for name in read)
    moments = sum(float(tap.size) ** 2 for tap in taps)
    return tokens * (2 * forward + moments) + GAIN_TOKENS * len(set(read)) * forward


def too_much_work(model: onnx.ModelProto, tokens: int) -> str:
    """Return why a compile should not do that unasked, and what to do; "" if it may.

    Args:
        model: The source; its weights may be left out.
        tokens: Of the text.
    """
    work = probing_work(model, tokens)
    if work <= MOST_WORK:
        return ""
    return (
        f"{work:.1e} multiplications would be needed to learn what matters in this model, more than the "
        f"{MOST_WORK:.0e} that a compile spends unasked; --calib FILE or --calib self asks for it, and so does "
        "--recipe int4-probed instead of int4"
    )
