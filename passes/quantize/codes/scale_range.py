"""Whether float16 can hold the scales of a weight."""

from __future__ import annotations

import numpy as np

from onnxslim_llm.ir.weights import DerivedWeight, Weight

__all__ = ["half_holds_scales"]

#: Lines of the stored matrix that are looked at.
_LINES = 16
#: Range of a block of 64 normally distributed weights, by the geometric mean of their magnitudes.
_REACH = 9.0
#: Below the least normal number of float16, 2^-14, precision is lost: from here on more than 0.2 % of the scale.
_SMALLEST = 2.0**-16
#: Some blocks have larger scales than the usual one.
_LARGEST = float(np.finfo(np.float16).max) / 16


def half_holds_scales(weight: Weight, bits: int) -> bool:
    """Return whether the usual scale of a weight lies well within float16; its lines in between are not read.

    Args:
        weight: Of two dimensions. What is yet to be computed is taken to be of usual size.
        bits: Of the codes.
    """
    if isinstance(weight.storage, DerivedWeight):
        return True
    view = weight.view()
    lines = np.linspace(0, len(view) - 1, min(_LINES, len(view))).round().astype(np.int64)
    sample = np.abs(np.asarray(view[np.unique(lines)], np.float64))
    weight.release()
    sample = sample[np.isfinite(sample) & (sample > 0)]
    if not len(sample):
        return True
    # A mean of logarithms, so that a few outliers do not stand for all.
    step = _REACH * float(np.exp(np.log(sample).mean())) / (1 << bits)
    return _SMALLEST <= step <= _LARGEST
