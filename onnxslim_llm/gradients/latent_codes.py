"""Codes and scales while they are tuned: the numbers behind the rounded ones, and the optimizer that moves them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.gradients.backend import torch
from onnxslim_llm.gradients.tuning import Codes, Tunable

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LatentCodes", "LatentNumbers"]

#: How far from the middle of its code a number starts at most: what had to be rounded further away stays where it is
#: until gradients say otherwise.
_REACH = 0.45
_DECAYS = (0.9, 0.95)
_TINY = 1e-12


class LatentNumbers:
    """A tensor and its Adam state (Kingma & Ba 2015, arXiv 1412.6980).

    Args:
        values: What is to be moved, in place.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._mean, self._square = torch.zeros_like(values), torch.zeros_like(values)

    def move(self, gradient: Tensor, rate: float, step: int) -> None:
        """Go one step, the first one being step 1; no number moves by much more than `rate`."""
        first, second = _DECAYS
        self._mean.mul_(first).add_(gradient, alpha=1 - first)
        self._square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        size = (self._square / (1 - second**step)).sqrt_().add_(_TINY)
        self.values.addcdiv_(self._mean, size, value=-rate / (1 - first**step))


class LatentCodes:
    """One weight while it is tuned.

    Rounding passes gradients on as if it were not there, within the range of the codes (Bengio et al. 2013,
    arXiv 1308.3432). A scale is its start times (1 + r); the numbers behind the codes are in units of the scale, so
    that one rate fits all of them.

    Args:
        weight: Where it starts.
    """

    def __init__(self, weight: Tunable) -> None:
        self.weight = weight
        start = weight.start
        self._zeros = torch.from_numpy(start.zeros.astype(np.float32))
        self._scales = torch.from_numpy(np.ascontiguousarray(start.scales, np.float32))
        self._relative = LatentNumbers(torch.zeros_like(self._scales))
        self._fixed = torch.from_numpy(start.codes.astype(np.float32))
        self._numbers: LatentNumbers | None = None
        if weight.floats is not None:
            behind, movable = _behind(weight)
            self._numbers, self._movable = LatentNumbers(torch.from_numpy(behind)), torch.from_numpy(movable)

    def dequantized(self) -> Tensor:
        """Return the weight as it is now, [K, N]."""
        return self._by_rows(self._current_scales()).mul_(self._centred())

    def stored(self) -> Codes:
        """Return what would be stored now."""
        scales = self._current_scales().numpy()
        if self.weight.half:
            limit = float(np.finfo(np.float16).max)
            scales = np.clip(scales, -limit, limit).astype(np.float16).astype(np.float32)
        return Codes(self._codes().to(torch.uint8).numpy(), scales, self.weight.start.zeros)

    def gradients(self, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the gradients of a loss by the numbers behind the codes, [K, N], and by r of each scale, [KB, N].

        Args:
            gradient: Of the loss, by the weight [K, N].
        """
        by_scale = self._by_blocks(gradient * self._centred()) * self._scales
        if self._numbers is None:
            return None, by_scale
        inside = (self._numbers.values >= 0) & (self._numbers.values <= self.weight.levels) & self._movable
        return gradient * self._by_rows(self._current_scales()) * inside, by_scale

    def move(self, gradient: Tensor, code_rate: float, scale_rate: float, step: int) -> None:
        """Go one step.

        Args:
            gradient: Of the loss, by the weight [K, N].
            code_rate: As in `TuningPlan`.
            scale_rate: As in `TuningPlan`.
            step: 1 for the first one.
        """
        by_code, by_scale = self.gradients(gradient)
        if self._numbers is not None and by_code is not None:
            self._numbers.move(by_code, code_rate, step)
        self._relative.move(by_scale, scale_rate, step)

    def _codes(self) -> Tensor:
        return self._fixed if self._numbers is None else self._numbers.values.round().clamp_(0, self.weight.levels)

    def _centred(self) -> Tensor:
        return self._codes() - self._by_rows(self._zeros)

    def _current_scales(self) -> Tensor:
        return self._scales * (1 + self._relative.values)

    def _by_rows(self, blocks: Tensor) -> Tensor:
        """Return one number a row for one a block: [KB, N] to [K, N]."""
        return blocks.repeat_interleave(self.weight.block, 0)[: len(self._fixed)]

    def _by_blocks(self, rows: Tensor) -> Tensor:
        """Return sums over blocks: [K, N] to [KB, N]."""
        short = len(self._zeros) * self.weight.block - len(rows)
        whole = torch.nn.functional.pad(rows, (0, 0, 0, short)) if short else rows
        return whole.unflatten(0, (-1, self.weight.block)).sum(1)


def _behind(weight: Tunable) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the numbers behind the codes, and which of them may change their code."""
    assert weight.floats is not None
    start, rows = weight.start, len(weight.start.codes)
    codes = start.codes.astype(np.float32)
    scales, zeros = (np.repeat(x.astype(np.float32), weight.block, axis=0)[:rows] for x in (start.scales, start.zeros))
    exact = weight.floats / np.where(scales == 0, 1, scales) + zeros
    behind = codes + np.clip(np.where(scales == 0, codes, exact) - codes, -_REACH, _REACH)
    return behind.astype(np.float32), ~((weight.floats == 0) & (codes == zeros))
