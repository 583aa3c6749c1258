"""A source whose sizes are fixed, for targets that take nothing else: it runs beside the artifact on equal inputs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim_llm.artifact.environment import usable_cpus
from onnxslim_llm.artifact.sidefiles import carry_side_files
from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.ir.model import Model, open_model
from onnxslim_llm.ir.save import SaveOptions, save_model
from onnxslim_llm.ir.shapes.fixing import OPTION, free_dimensions, parse_sizes, resolve_sizes
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Pass
from onnxslim_llm.rewrite.registry import make_pass
from onnxslim_llm.runtime.signature import find_decoder
from onnxslim_llm.targets import Target

__all__ = ["FixedSource", "Shapes"]

_SAMPLES = "samples"
#: Steps that ranges and gates are taken from: each is one token of its own text.
_STEPS = (16, 128)
#: Bytes of their caches; with large ones there are fewer steps.
_STEP_BYTES = 1 << 30
_ROTARY = "fold_rotary_tables"
#: Qualcomm's simulator (onnxruntime-qnn 2.7.0) reads the last row of a 16-bit table of 16 columns wrongly.
_UNREAD_ROWS = 1


@dataclass(frozen=True)
class Shapes:
    """The sizes that were asked for, resolved for one model.

    Attributes:
        sizes: By symbol, or by "INPUT.AXIS".
        text: As the pass fix_shapes takes them.
        positions: The longest text that fits, cache included; 0 if the model's inputs do not say it.
    """

    sizes: dict[str, int]
    text: str
    positions: int

    @classmethod
    def of(cls, model: Model, target: Target, wanted: str) -> Shapes:
        """Check the sizes against the model and the target.

        Raises:
            UsageError: A name fits no dimension, or the target needs a size that is not given.
        """
        sizes = resolve_sizes(model.graph.inputs, parse_sizes(wanted))
        missing = [(where, name) for where, name in free_dimensions(model.graph.inputs) if name not in sizes]
        if target.fixed_shapes and missing:
            where, name = missing[0]
            sizes_wanted = ",".join(f"{each}=SIZE" for _, each in missing)
            raise UsageError(
                f"target '{target.name}' needs fixed sizes, and '{name}' has none",
                where=where,
                todo=f"{OPTION} {sizes_wanted} (0 for the cache of a graph that reads prompts)",
            )
        text = ",".join(f"{name}={size}" for name, size in sizes.items())
        fixed = model.copy()
        if text:
            make_pass("fix_shapes", {"sizes": text}).apply(fixed, Context())
        return cls(sizes, text, _longest(fixed) if target.fixed_shapes else 0)

    def passes(self) -> list[Pass]:
        """Return the pass that fixes the sizes, if any are given."""
        return [make_pass("fix_shapes", {"sizes": self.text})] if self.text else []

    def for_lowering(self, steps: list[Pass]) -> list[Pass]:
        """Return the passes with what the sizes tell: a fixed text has as many positions as tokens."""
        if not self.positions:
            return steps
        table = make_pass(_ROTARY, {"positions": self.positions + _UNREAD_ROWS, "max_share": 1.0})
        return [table if step.name == _ROTARY else step for step in steps]


def _longest(model: Model) -> int:
    """Return the largest size of the second axis of integer inputs: tokens, or the mask over cache and tokens."""
    integers = [t for t in model.graph.inputs if t.dtype is not None and np.dtype(t.dtype).kind in "iu" and t.shape]
    return max((t.shape[1] for t in integers if len(t.shape) == 2 and isinstance(t.shape[1], int)), default=0)


class FixedSource:
    """The source with fixed sizes, in a folder of the work in progress.

    Args:
        source: The .onnx file.
        shapes: What is fixed.
        folder: Where it may lie; `discard` removes it.
        threads: Of the runtime.
    """

    def __init__(self, source: Path, shapes: Shapes, folder: Path, threads: int) -> None:
        self._source = source
        self._folder = folder
        self._threads = threads
        folder.mkdir(parents=True, exist_ok=True)
        model = open_model(source)
        make_pass("fix_shapes", {"sizes": shapes.text}).apply(model, Context())
        self.path = folder / "source.onnx"
        save_model(model, self.path, SaveOptions(jobs=threads or usable_cpus()))
        carry_side_files(source.parent, folder, only_known=True)
        self._caches = [tensor for tensor in model.graph.inputs if _is_cache(tensor)]

    @property
    def has_caches(self) -> bool:
        """Whether inputs have the shape of caches, which `samples` fills."""
        return bool(self._caches)

    def samples(self, tokens: np.ndarray[tuple[int], np.dtype[np.int64]] | None) -> Path | None:
        """Write inputs of steps: only what the model itself has seen makes a cache.

        Every other step has a full cache; in the others more and more of it is filled, from its end, and the rest
        masked, as after a prompt that is shorter than the cache.

        Args:
            tokens: Of real text; None: random ones.

        Returns:
            A folder of .npz files; None if the fixed model has no cache, or is no decoder.

        Raises:
            UsageError: It is a decoder, but its cache cannot be filled.
        """
        if not self._caches:
            return None
        from onnxslim_llm.runtime.decoder import DecoderRunner
        from onnxslim_llm.runtime.session import open_session

        session = open_session(self._source, threads=self._threads)
        signature, why = find_decoder(session)
        fixed = {info.name: info.shape for info in open_session(self.path, threads=self._threads).inputs}
        if signature is None:
            return None  # what has the shape of a cache is something else: it reads no tokens
        if not signature.caches:
            raise UsageError(
                f"the cache cannot be filled: {why or 'it has none'}", where=OPTION, todo="fix its size to 0"
            )
        runner = DecoderRunner(session, signature)
        pair = signature.caches[0]
        batch, new = (int(size) for size in fixed[signature.ids] or ())  # type: ignore[arg-type]
        past = int((fixed[pair.past] or ())[pair.sequence_axis])  # type: ignore[arg-type]
        caches = sum(_bytes(fixed[each.past], each.dtype) for each in signature.caches)
        count = min(max(_STEP_BYTES // max(caches, 1), _STEPS[0]), _STEPS[1])
        rows = _rows(tokens, runner.vocab, (count, batch, past + new))
        folder = self._folder / _SAMPLES
        folder.mkdir(exist_ok=True)
        may_pad = signature.mask is not None and signature.mask_rank == 2 and not signature.extras
        for number, ids in enumerate(rows):
            filled = _filled(number, count, past) if may_pad else past
            _, state = runner.extend(ids[:, past - filled : past])
            values = {**runner.step_feeds(ids[:, past:], state), **state.caches}
            axes = {pair.past: pair.sequence_axis for pair in signature.caches}
            if signature.mask is not None:
                axes[signature.mask] = 1
            arrays = {name: _in_front(session.array(values[name]), axes.get(name), past - filled) for name in fixed}
            np.savez(folder / f"step-{number:03}.npz", **arrays)  # type: ignore[arg-type]  # names are no options
        return folder

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _bytes(shape: Sequence[int | str | None] | None, dtype: np.dtype[Any]) -> int:
    return math.prod(size for size in shape or () if isinstance(size, int)) * dtype.itemsize


def _filled(number: int, count: int, past: int) -> int:
    """Return how many tokens of the cache step `number` finds filled."""
    return past if number % 2 == 0 else max(1, past * (number + 1) // count)


def _in_front(values: NDArray[Any], axis: int | None, count: int) -> NDArray[Any]:
    """Put `count` zeros in front of an axis."""
    if axis is None or not count:
        return values
    return np.pad(values, [(count if i == axis else 0, 0) for i in range(values.ndim)])


def _is_cache(tensor: gs.Tensor) -> bool:
    return tensor.dtype is not None and np.dtype(tensor.dtype).kind in "fV" and len(tensor.shape or ()) >= 3


def _rows(
    tokens: np.ndarray[tuple[int], np.dtype[np.int64]] | None, vocab: int, shape: tuple[int, int, int]
) -> np.ndarray[tuple[int, int, int], np.dtype[np.int64]]:
    """Return [steps, batch, length] token ids.

    Raises:
        ModelError: The text has a token that the model does not know.
    """
    if tokens is None or not tokens.size:
        return np.random.default_rng(0).integers(0, vocab, shape)
    if int(tokens.max()) >= vocab:
        raise ModelError(f"the text has the token {int(tokens.max())}, the vocabulary {vocab}", where="--calib")
    return np.resize(tokens, shape)
