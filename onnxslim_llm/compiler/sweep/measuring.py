"""The figures of one artifact next to its source: quality on a text, and speed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from onnxslim_llm.errors import SlimError, UsageError
from onnxslim_llm.runtime.bench import bench, stored_bytes
from onnxslim_llm.runtime.session import Array, Session, open_session
from onnxslim_llm.runtime.sidefiles import SideFiles
from onnxslim_llm.runtime.signature import find_decoder
from onnxslim_llm.runtime.tokenizer import load_tokenizer
from onnxslim_llm.targets.base import Target
from onnxslim_llm.verify.quality import evaluate_tokens
from onnxslim_llm.verify.text import read_tokens

__all__ = ["Ruler"]

_PROMPT_TOKENS, _NEW_TOKENS = 256, 32
Progress = Callable[[int, int], None]


@dataclass
class Ruler:
    """Measures artifacts of one source on the same tokens.

    Attributes:
        source: The .onnx file.
        target: What the artifacts are for.
        tokens: Ids [n] of the text.
        window: Tokens that a prediction can look back on.
        threads: Of the runtime.
        rounds: Rounds of the speed measurement, in each of which both models take their turn; 0: none.
    """

    source: Path
    target: Target
    tokens: Array
    window: int
    threads: int
    rounds: int
    _session: Session = field(repr=False)

    @classmethod
    def of(
        cls, source: Path, target: Target, text: Path, *, window: int, max_tokens: int | None, threads: int, rounds: int
    ) -> Ruler:
        """Open the source and read the text, with the tokenizer beside the source.

        Raises:
            UsageError: The text cannot be read, is too short, or the model is no decoder.
            ModelError: The model or its tokenizer cannot be opened, or they do not belong together.
        """
        tokens = read_tokens(text, load_tokenizer(source.parent), max_tokens)
        session = open_session(source, threads=threads)
        signature, why = find_decoder(session)
        if signature is None:
            what = f"a text cannot be fed to this model: {why}"
            raise UsageError(what, where=str(source), todo="sweeps are for decoders; compare encoders with `diff`")
        return cls(source, target, tokens, window, threads, rounds, session)

    @property
    def token_sha256(self) -> str:
        """SHA-256 of the tokens as little-endian int32, as `eval` gives it."""
        return hashlib.sha256(self.tokens.astype("<i4").tobytes()).hexdigest()

    def quality(self, artifact: Path, progress: Progress) -> dict[str, Any]:
        """Return the figures of `SweepPoint` on the text, by name.

        Raises:
            ModelError: The artifact does not run, or its logits are not finite.
        """
        session = self.target.open(artifact, threads=self.threads)
        found = evaluate_tokens(
            session,
            self.tokens,
            versus=self._session,
            window=self.window,
            threads=self.threads,
            progress=progress,
            greedy=False,
        )
        difference = found.difference
        assert difference is not None, "the source was given"
        return {
            "ppl": found.ppl,
            "ppl_ratio": difference.ppl_ratio,
            "kld_mean": difference.kld_mean,
            "kld_p99": difference.kld_p99,
            "top1_agreement": difference.top1_agreement,
            "tokens_left_out": found.left_out,
        }

    def speed(self, artifact: Path) -> tuple[dict[str, float], str]:
        """Return speeds and their ratios to the source's, by name, and why there are none."""
        if not self.rounds:
            return {}, ""
        context = SideFiles.of(self.source.parent).context_length or 2 * _PROMPT_TOKENS
        prompt, new = min(_PROMPT_TOKENS, context // 2), min(_NEW_TOKENS, context // 4)
        try:
            models = [self.source, artifact]
            report = bench(
                models, prompt_tokens=prompt, new_tokens=new, repeats=self.rounds, threads=self.threads or None
            )
        except SlimError as error:
            return {}, f"its speed was not measured: {error.what}"
        source, ours = report.results
        figures: dict[str, float] = {}
        for kind in ("prefill", "decode"):
            rate = getattr(ours, f"{kind}_tokens_per_second")
            if rate:
                # Of each round by itself: what else the machine did slowed down both.
                ratios = [a / b for a, b in zip(source.samples[kind], ours.samples[kind], strict=True)]
                figures |= {f"{kind}_tokens_per_second": rate, f"{kind}_ratio": median(ratios)}
        return figures, ""

    def bytes(self, model: Path) -> int:
        """Return the bytes of a model and its external data."""
        return stored_bytes(model)
