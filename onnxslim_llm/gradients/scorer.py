"""Figures of gradients of a model's own answers, added up over the calibration data."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxslim_llm.errors import ModelError
from onnxslim_llm.gradients.source import Figure, StoredFigures
from onnxslim_llm.ir.weights import weight_of
from onnxslim_llm.runtime.session import Session
from onnxslim_llm.runtime.signature import find_decoder
from onnxslim_llm.stats.calibration import Feeds
from onnxslim_llm.stats.observe import open_graph

if TYPE_CHECKING:
    from torch import Tensor

    from onnxslim_llm.gradients.executor import Executor
    from onnxslim_llm.ir.model import Model

__all__ = ["GRADIENT_BYTES", "GRADIENT_TOKENS", "GradientScorer"]

#: Tokens (rows of the answer) that gradients are computed on.
GRADIENT_TOKENS = 16_384
#: Bytes of gradients held at a time: more weights take more runs over the data.
GRADIENT_BYTES = 512 << 20


@dataclass
class GradientScorer:
    """Runs graphs in torch; see `GradientSource`.

    Attributes:
        feeds: Returns the inputs of every sample, for a model with the signature of this session.
        folder: Where figures lie until the weights are written; made if it does not exist.
        tokens: Rows of the answer to use.
        limit: Bytes of gradients held at a time.
        threads: Of ONNX Runtime, which only looks at the signature; torch has its own setting.
        progress: Called after each sample with (done, of how many).
    """

    feeds: Callable[[Session], Iterable[Feeds]]
    folder: Path
    tokens: int = GRADIENT_TOKENS
    limit: int = GRADIENT_BYTES
    threads: int = 0
    progress: Callable[[int, int], None] = field(default=lambda done, total: None)

    def check(self) -> None:
        """See `GradientSource.check`."""
        import onnxslim_llm.gradients.backend  # noqa: F401  # it says what to install

    def figures(self, model: Model, weights: Sequence[str], figure: Figure) -> Mapping[str, StoredFigures]:
        """See `GradientSource.figures`."""
        from onnxslim_llm.gradients.executor import Executor
        from onnxslim_llm.gradients.weight_products import product_rules

        sizes = {t.name: weight_of(t).size for t in model.constants() if t.name in set(weights)}
        executor = Executor(model, product_rules(model, set(weights), figure))
        answer, samples = self._samples(model)
        for where, op in executor.unsupported([answer.name]):
            todo = "choose a method that needs no gradients"
            raise ModelError(f"{op} has no gradient here", where=f"node '{where}'", todo=todo)
        groups = list(_groups(sizes, self.limit))
        found: dict[str, StoredFigures] = {}
        for number, names in enumerate(groups):
            sums = self._sums(executor, names, answer, samples, (number, len(groups)))
            found |= {name: self._store(name, figure, values) for name, values in sums.items()}
        return found

    def _samples(self, model: Model) -> tuple[_Answer, list[Feeds]]:
        """Return what the model answers with, and as many samples as are wanted."""
        with tempfile.TemporaryDirectory(prefix="gradients-") as scratch:
            session = open_graph(model, Path(scratch), self.threads)
            signature, _ = find_decoder(session)
            answer = _Answer(signature.logits if signature else session.outputs[0].name, signature is not None)
            samples, seen = [], 0
            for feeds in self.feeds(session):
                mask = feeds.get(signature.mask) if signature and signature.mask else None
                if mask is not None and mask.dtype.kind in "iub" and not mask.all():
                    continue  # padded: there for the range of the mask
                samples.append({info.name: feeds[info.name] for info in session.inputs})
                seen += samples[-1][signature.ids].size if signature else 1
                if seen >= self.tokens:
                    break
            return answer, samples

    def _sums(
        self, executor: Executor, names: Sequence[str], answer: _Answer, samples: list[Feeds], part: tuple[int, int]
    ) -> dict[str, Any]:
        from onnxslim_llm.gradients.backend import torch

        random = torch.Generator().manual_seed(0)
        values = {name: executor.weight(name).detach().clone().requires_grad_() for name in names}
        rows = 0
        for number, feeds in enumerate(samples):
            result = executor.run(feeds, values, [answer.name])[answer.name]
            if not bool(torch.isfinite(result).all()):
                raise ModelError("the calibration data make NaN or infinite values", where=f"tensor '{answer.name}'")
            loss, count = answer.loss(result, random)
            loss.backward()
            rows += count
            self.progress(part[0] * len(samples) + number + 1, part[1] * len(samples))
        return {
            name: np.zeros(tuple(w.shape), np.float32) if w.grad is None else (w.grad / max(rows, 1)).numpy()
            for name, w in values.items()
        }

    def _store(self, name: str, figure: Figure, values: Any) -> StoredFigures:
        self.folder.mkdir(parents=True, exist_ok=True)
        label = hashlib.sha256(f"{figure} {name}".encode()).hexdigest()[:32]
        np.save(self.folder / f"{label}.npy", values)
        return StoredFigures(self.folder / f"{label}.npy", hashlib.sha256(values.tobytes()).hexdigest())


@dataclass(frozen=True)
class _Answer:
    """What a model says: tokens' logits, or any tensor.

    Attributes:
        name: The output.
        logits: Whether its last axis is a distribution over tokens.
    """

    name: str
    logits: bool

    def loss(self, result: Tensor, random: Any) -> tuple[Tensor, int]:
        """Return minus the log likelihood, summed over rows, of answers drawn from the model itself; and the rows.

        An output that is no distribution counts as the mean of a normal one, as wide as the output's mean square: then
        the squared gradients say what happens to the relative squared difference, which is twice a KL divergence.
        """
        from onnxslim_llm.gradients.backend import torch

        flat = result.reshape(-1, result.shape[-1]).float()
        if self.logits:
            with torch.no_grad():
                labels = torch.multinomial(torch.softmax(flat, -1), 1, generator=random)
            return torch.nn.functional.cross_entropy(flat, labels[:, 0], reduction="sum"), len(flat)
        with torch.no_grad():
            noise = torch.randn(flat.shape, generator=random)
            width = flat.square().sum(-1).mean().sqrt()
        return (flat * noise).sum() / width, len(flat)


def _groups(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Yield names whose gradients take at most `limit` bytes together (a single one may take more)."""
    group: list[str] = []
    used = 0
    for name, size in sizes.items():
        nbytes = 4 * size * 2  # the gradient, and the copy of the weight that receives it
        if group and used + nbytes > limit:
            yield group
            group, used = [], 0
        group.append(name)
        used += nbytes
    if group:
        yield group
