"""Tuning codes and scales of a decoder, all layers at once, by the KL divergence of its answers to its source's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import cos, pi
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_llm.concepts.block_weights import BLOCK_GATHER, BLOCK_MATMUL
from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.gradients.tuning import Codes, Tunable, TuningPlan, TuningResult
from onnxslim_llm.runtime.decoder import DecoderRunner
from onnxslim_llm.runtime.session import open_session
from onnxslim_llm.runtime.signature import DecoderSignature, find_decoder
from onnxslim_llm.stats.calibration import Calibration, TokenCalibration
from onnxslim_llm.stats.observe import open_graph

if TYPE_CHECKING:
    from torch import Tensor

    from onnxslim_llm.gradients.executor import Executor
    from onnxslim_llm.gradients.latent_codes import LatentCodes
    from onnxslim_llm.gradients.rule import Call, Rule
    from onnxslim_llm.ir.model import Model
    from onnxslim_llm.runtime.session import Session

__all__ = ["LogitTuner"]

Array = NDArray[Any]

#: Every so many windows, one is not learned from but says whether the learning helps.
_HELD_OUT = 5
#: Windows are held out at most: each costs a run of both models at every look.
_MOST_HELD_OUT = 16
#: Looks at the held-out windows on the way, and how many may pass without a better one.
_LOOKS, _PATIENCE = 8, 3
#: Share of the steps in which the rates rise, and what is left of them in the end.
_WARM_UP, _LEAST_RATE = 0.04, 0.02


@dataclass
class LogitTuner:
    """See `CodeTuner`.

    Every window runs in one thread, and what windows say is added up in their order: the result does not depend on the
    number of threads. Memory: some 24 bytes a coded weight, 4 more for each thread, and what a window's activations
    take in torch.

    Attributes:
        source: The .onnx file of the source model.
        data: Returns the calibration data.
        threads: Windows that run at a time.
        progress: Called after each step with (done, of how many, what to tell).
    """

    source: Path
    data: Callable[[], Calibration]
    threads: int = 1
    progress: Callable[[int, int, str], None] = field(default=lambda done, total, text: None)

    def tune(self, model: Model, weights: Sequence[Tunable], plan: TuningPlan) -> TuningResult:
        """See `CodeTuner.tune`."""
        from onnxslim_llm.gradients.executor import Executor
        from onnxslim_llm.gradients.latent_codes import LatentCodes

        executor = Executor(model, _rules(model, {weight.tensor for weight in weights}))
        source = open_session(self.source, threads=1)
        with tempfile.TemporaryDirectory(prefix="tuning-") as scratch:
            session = open_graph(model, Path(scratch), self.threads)
            pair = _Pair(executor, _runner(source), _runner(session))
        if pair.logits not in executor.outputs or pair.student.signature.last_token_only:
            raise ModelError("logits of all tokens are needed", where=str(self.source), todo="use --logits all")
        for where, op in executor.unsupported([pair.logits]):
            raise ModelError(f"{op} has no gradient here", where=f"node '{where}'", todo="leave tune_codes out")
        data = self._windows(plan, pair.student.signature)
        with _single_threads(), ThreadPoolExecutor(max(1, self.threads)) as pool:
            return _Run(pair, plan, data, [LatentCodes(weight) for weight in weights], pool, self.progress).result()

    def _windows(self, plan: TuningPlan, signature: DecoderSignature) -> _Windows:
        data = self.data()
        if not isinstance(data, TokenCalibration):
            raise UsageError("tuning needs a text, not arrays", where="--calib", todo="give --calib TEXT, or self")
        tokens, rows = data.tokens, signature.batch or 1
        length = signature.length or min(plan.window, data.window)
        count = len(tokens) // (rows * length)
        if count < 2:
            what = f"{len(tokens)} tokens are too few to tune with: windows have {rows * length}, and one is held out"
            raise UsageError(what, where="--calib", todo="give a longer text")
        whole = np.asarray(tokens[: count * rows * length], np.int64).reshape(count, rows, length)
        held = np.arange(count) % min(_HELD_OUT, count) == min(_HELD_OUT, count) - 1
        return _Windows(whole[~held], whole[held][:_MOST_HELD_OUT])


@dataclass(frozen=True)
class _Windows:
    """Token ids [windows, rows, length] to learn from, and others to judge by."""

    fit: Array
    held: Array


@dataclass(frozen=True)
class _Pair:
    """The model that is tuned, and the one that it shall answer like."""

    executor: Executor
    teacher: DecoderRunner
    student: DecoderRunner

    @property
    def logits(self) -> str:
        return self.student.signature.logits

    def divergence(self, ids: Array, values: dict[str, Tensor]) -> Tensor:
        """Return the sum over tokens of KL(source || model), given the weights by the names of their codes."""
        from onnxslim_llm.gradients.backend import torch

        theirs = self.teacher.session.run(self.teacher.arrays(ids), [self.teacher.signature.logits])
        wanted = torch.from_numpy(np.asarray(theirs[self.teacher.signature.logits], np.float32)).log_softmax(-1)
        given = self.executor.run(self.student.arrays(ids), values, [self.logits])[self.logits]
        loss: Tensor = torch.nn.functional.kl_div(given.log_softmax(-1), wanted, reduction="sum", log_target=True)
        return loss


@dataclass
class _Run:
    """One run of the optimizer."""

    pair: _Pair
    plan: TuningPlan
    data: _Windows
    latent: list[LatentCodes]
    pool: ThreadPoolExecutor
    progress: Callable[[int, int, str], None]

    def result(self) -> TuningResult:
        """Tune, and return the best that was seen."""
        best = [latent.weight.start for latent in self.latent]
        curve = [(0, self._held_out(best))]
        least, at, done = curve[0][1], 0, 0
        every = max(1, self.plan.steps // _LOOKS)
        for done, windows in enumerate(self._batches(), 1):
            self._step(windows, done)
            if done % every == 0 or done == self.plan.steps:
                now = [latent.stored() for latent in self.latent]
                curve.append((done, self._held_out(now)))
                if curve[-1][1] < least:
                    best, least, at = now, curve[-1][1], done
                if len(curve) - 1 - [step for step, _ in curve].index(at) >= _PATIENCE:
                    break
            self.progress(done, self.plan.steps, f"step {done}, KL {curve[0][1]:.4g} to {least:.4g}")
        tokens = (int(self.data.fit.size), int(self.data.held.size))
        return TuningResult(best, curve[0][1], least, done, at, tokens, curve)

    def _batches(self) -> Iterator[Array]:
        """Yield windows for each step: all of them once, then again in another order."""
        random = np.random.default_rng(self.plan.seed)
        fit = self.data.fit
        order: list[int] = []
        for _ in range(self.plan.steps):
            while len(order) < self.plan.batch:
                order += random.permutation(len(fit)).tolist()
            windows = fit[order[: self.plan.batch]]
            order = order[self.plan.batch :]
            others = fit.reshape(-1)[random.integers(0, fit.size, windows.shape)]
            yield np.where(random.random(windows.shape) < self.plan.replaced, others, windows)

    def _step(self, windows: Array, step: int) -> None:
        from onnxslim_llm.gradients.backend import torch

        values = {latent.weight.tensor: latent.dequantized() for latent in self.latent}

        def gradients(ids: Array) -> Sequence[Tensor | None]:
            own = {name: value.detach().requires_grad_() for name, value in values.items()}
            loss = self.pair.divergence(ids, own) / windows.size
            found: Sequence[Tensor | None] = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
            return found

        total: list[Tensor | None] = [None] * len(values)
        for found in self.pool.map(gradients, windows):
            total = [b if a is None else a if b is None else a.add_(b) for a, b in zip(total, found, strict=True)]
        rate = self._rate(step)
        for latent, gradient in zip(self.latent, total, strict=True):
            if gradient is not None:
                latent.move(gradient, rate * self.plan.code_rate, rate * self.plan.scale_rate, step)

    def _rate(self, step: int) -> float:
        """Return the share of the rates that a step goes by: a short rise, then half a cosine."""
        rise = min(1.0, step / max(1.0, _WARM_UP * self.plan.steps))
        return rise * max(_LEAST_RATE, (1 + cos(pi * (step - 1) / self.plan.steps)) / 2)

    def _held_out(self, weights: Sequence[Codes]) -> float:
        """Return the mean KL divergence on the held-out windows."""
        from onnxslim_llm.gradients.backend import torch

        values = {
            latent.weight.tensor: torch.from_numpy(_dequantized(codes, latent.weight.block))
            for latent, codes in zip(self.latent, weights, strict=True)
        }

        def divergence(ids: Array) -> float:
            with torch.no_grad():
                return float(self.pair.divergence(ids, values))

        return sum(self.pool.map(divergence, self.data.held)) / self.data.held.size


def _dequantized(codes: Codes, block: int) -> Array:
    rows = len(codes.codes)
    scales, zeros = (np.repeat(x.astype(np.float32), block, axis=0)[:rows] for x in (codes.scales, codes.zeros))
    result: Array = (codes.codes.astype(np.float32) - zeros) * scales
    return result


def _rules(model: Model, tensors: set[str]) -> dict[int, Rule]:
    """Return rules for what reads these codes: they get the whole weight [K, N] in their place."""
    from onnxslim_llm.gradients.backend import torch

    def product(call: Call) -> Tensor:
        return call.input(0) @ call.input(1)

    def look_up(call: Call) -> Tensor:
        found: Tensor = torch.nn.functional.embedding(call.input(0), call.input(1).T)
        return found

    return {
        id(node): product if BLOCK_MATMUL.is_call(node) else look_up
        for node in model.graph.nodes
        if (BLOCK_MATMUL.is_call(node) or BLOCK_GATHER.is_call(node)) and node.inputs[1].name in tensors
    }


def _runner(session: Session) -> DecoderRunner:
    signature, why = find_decoder(session)
    if signature is None:
        what = f"answers can only be tuned where a model writes text: {why}"
        raise ModelError(what, where=session.where, todo="leave tune_codes out")
    return DecoderRunner(session, signature)


@contextmanager
def _single_threads() -> Iterator[None]:
    """Let torch use one thread an operator: windows run side by side, and their sums have one order."""
    from onnxslim_llm.gradients.backend import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
